"""A hook of MkDocs: README and CONTRIBUTING as pages of the site, and links that leave docs/ as what they are called.

The files are written to be read in the repository, too: their links are relative to where they lie there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository → their pages of the site."""

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose files lie outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=rewritten((REPO / source).read_text(encoding="utf-8"), "")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Of pages that lie in docs/."""
    return markdown if page.file.src_uri in PAGES.values() else rewritten(markdown, "docs")


def rewritten(markdown: str, folder: str) -> str:
    """`markdown` of a file in `folder` of the repository, with links to pages of the site, and text for links to other files of the repository."""

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{anchor})"
        if path.startswith("docs/") and path.endswith(".md"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        if not (REPO / path).exists():
            return found[0]  # MkDocs says that it is dead
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return LINK.sub(link, markdown)
