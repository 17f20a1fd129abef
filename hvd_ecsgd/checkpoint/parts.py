"""The files of a checkpoint: one part per rank and the manifest that names them, written aside and put in place; and read, checked."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Collection
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from ..core.state import MethodState
from ..core.talk import everyone, text_of, together
from ..core.trees import decode, encode
from ..errors import CheckpointError
from ..transport import Transport
from ..version import __version__
from .resize import Done, Leaf, merge, resized_state, shares

__all__ = ["FORMAT", "MANIFEST", "Parts", "Save", "digest_of", "read_manifest"]

FORMAT = 1
MANIFEST = "manifest.json"
_PART = "part-{id}-rank{rank:05d}.safetensors"
_TREE = "hvd_ecsgd"
"""Entry of a part's metadata: the tree of everything saved, as JSON, with tensors referred to by name."""


# -- saving ----------------------------------------------------------------------------------------------------------------------


class Save:
    """One save in progress. What it makes is removed again unless it is published."""

    def __init__(self, folder: Path, transport: Transport, stack: contextlib.ExitStack) -> None:
        self.folder, self.transport, self.stack = folder, transport, stack
        self.first = transport.rank == 0
        self.id = everyone(transport, secrets.token_hex(8) if self.first else "", "checkpoint.id")[0]
        self.part = folder / _PART.format(id=self.id, rank=transport.rank)
        self.temporary = self.part.with_suffix(".tmp")
        self.reports: list[dict[str, Any]] = []

    def begin(self, ours: Collection[str], overwrite: bool) -> None:
        """Rank 0 looks whether the place is free, or has a checkpoint of these ids, and holds it until the save is over."""
        with together(self.transport, "checkpoint.begin"):
            if self.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock()
                if (self.folder / MANIFEST).exists() and not overwrite:
                    there = read_manifest(self.folder)
                    if there["id"] not in ours:
                        raise CheckpointError(
                            f"{self.folder} holds a checkpoint (step {there['step']}, {there['size']} workers) that this training neither saved nor "
                            "loaded: is another job saving there? Use another directory, load it first, or pass overwrite=True to replace it."
                        )

    def _lock(self) -> None:
        """Two jobs do not save at the same time. The system lets go of the lock when the process ends, however it ends."""
        path = self.folder / "saving.lock"
        file = self.stack.enter_context(path.open("a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CheckpointError(
                f"another job is saving to {self.folder} right now ({file.read().strip() or path}); use a directory for each job."
            ) from None
        except OSError:
            return  # a file system without locks: the comparison of manifests remains
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()

    def write_part(self, everything: Any) -> None:
        """Write this rank's part under a temporary name, then rename it."""
        with together(self.transport, "checkpoint.part"):
            package = _safetensors()
            tensors: dict[str, torch.Tensor] = {}
            tree = encode(everything, "", tensors)
            digests = {name: digest_of(t) for name, t in tensors.items()}
        first = everyone(self.transport, digests if self.first else {}, "checkpoint.tensors")[0]
        known = {digest: (0, name) for name, digest in reversed(first.items())}
        with together(self.transport, "checkpoint.part"):
            own: dict[str, torch.Tensor] = {}
            memory: set[int] = set()
            places: dict[str, list[Any]] = {}
            for name, digest in digests.items():
                part, key = known.setdefault(digest, (self.transport.rank, name))
                if (part, key) == (self.transport.rank, name):
                    own[name] = _plain(tensors[name], memory)
                places[name] = [part, key, digest]
            about = {"id": self.id, "rank": self.transport.rank, "tree": tree, "tensors": places}
            package.save_file(own, str(self.temporary), {_TREE: json.dumps(about, allow_nan=False)})
            report = {"file": self.part.name, "bytes": _sync(self.temporary), "blake2b": _file_digest(self.temporary)}
            os.replace(self.temporary, self.part)
        self.reports = everyone(self.transport, report, "checkpoint.reports")

    def publish(self, manifest: dict[str, Any]) -> None:
        """Rank 0 looks at all parts and replaces the manifest: from then on the directory holds this checkpoint. Older parts are removed."""
        with together(self.transport, "checkpoint.manifest"):
            if self.first:
                for r, report in enumerate(self.reports):
                    path = self.folder / report["file"]
                    if not path.exists() or path.stat().st_size != report["bytes"]:
                        raise CheckpointError(f"{path}, which rank {r} wrote, is not there on rank 0's host: all hosts must share the directory.")
                temporary = self.folder / f"{MANIFEST}.{self.id}.tmp"
                try:
                    temporary.write_text(json.dumps({**manifest, "parts": self.reports}, indent=1), encoding="utf-8")
                    _sync(temporary)
                    os.replace(temporary, self.folder / MANIFEST)
                finally:
                    temporary.unlink(missing_ok=True)
        if self.first:
            with contextlib.suppress(OSError):  # it is saved; what cannot be removed is only in the way
                _sync(self.folder)
                current = {report["file"] for report in self.reports}
                for path in [*self.folder.glob("part-*"), *self.folder.glob(f"{MANIFEST}.*.tmp")]:
                    if path.name not in current:
                        path.unlink(missing_ok=True)

    def discard(self) -> None:
        for path in (self.temporary, self.part):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _plain(t: torch.Tensor, memory: set[int]) -> torch.Tensor:
    """On the CPU, contiguous, alone in its memory (addresses in use are in `memory`)."""
    t = t.detach().to("cpu").contiguous()
    if t.untyped_storage().nbytes() != t.nbytes or t.data_ptr() in memory:
        t = t.clone()
    memory.add(t.data_ptr())
    return t


def digest_of(t: torch.Tensor) -> str:
    """Hash of type, shape and bits."""
    plain = t.detach().to("cpu").contiguous()
    digest = blake2b(f"{plain.dtype} {tuple(plain.shape)}".encode(), digest_size=16)
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> int:
    """Force a file (or a folder's entries) to the disk; its size in bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        return os.fstat(handle).st_size
    finally:
        os.close(handle)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError("save_checkpoint and load_checkpoint need the package safetensors: pip install safetensors.") from error
    return safetensors.torch


# -- loading ---------------------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `folder`. Raises `CheckpointError` when there is none, or none that this version reads."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no checkpoint: there is no {MANIFEST}.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}).") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{path} is not the manifest of a checkpoint of hvd-ecsgd.")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} was written by {manifest.get('library', 'another version')} in format {manifest['format']}; this is hvd-ecsgd {__version__}, "
            f"which reads format {FORMAT}. Load it with that version."
        )
    parts = manifest.get("parts")
    if not isinstance(parts, list) or len(parts) != manifest.get("size") or not {"id", "step", "optimizer", "method"} <= set(manifest):
        named = len(parts) if isinstance(parts, list) else "no"
        raise CheckpointError(f"{path} is damaged: it names {named} parts of {manifest.get('size')} workers, or lacks an entry.")
    if not isinstance(manifest["method"], dict) or not all(isinstance(p, dict) and {"file", "bytes", "blake2b"} <= set(p) for p in parts):
        raise CheckpointError(f"{path} is damaged: what it says of the method or of a part is not what this version writes.")
    return manifest


class Parts:
    """The parts of a checkpoint, opened when they are needed and closed with the stack."""

    def __init__(self, folder: Path, manifest: dict[str, Any], stack: contextlib.ExitStack) -> None:
        self._safetensors = _safetensors()
        self.folder, self.manifest, self._stack = folder, manifest, stack
        self._open: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._lazy: dict[int, Any] = {}
        self._given: set[tuple[int, str]] = set()

    def verify(self, r: int) -> None:
        """Part r is there, complete, and the one that the manifest means."""
        report = self.manifest["parts"][r]
        path = self.folder / report["file"]
        if not path.exists():
            raise CheckpointError(f"{path}, the part of rank {r} of {self.manifest['size']}, is missing.")
        if path.stat().st_size != report["bytes"]:
            raise CheckpointError(f"{path}, the part of rank {r}, is damaged: {path.stat().st_size} bytes, {report['bytes']} were written.")
        if _file_digest(path) != report["blake2b"]:
            try:
                about = self._about(r)
                other = (about["id"], about["rank"]) != (self.manifest["id"], r)
            except Exception:
                other = False
            if other:
                raise CheckpointError(
                    f"{path} is not the part of rank {r} of this checkpoint, but of rank {about['rank']} of another one; copy directories as a whole."
                )
            raise CheckpointError(f"{path}, the part of rank {r}, is damaged: its checksum is not the one it was written with.")

    def _handle(self, r: int) -> tuple[Any, dict[str, Any]]:
        if r not in self._open:
            import safetensors

            path = self.folder / self.manifest["parts"][r]["file"]
            try:
                file = self._stack.enter_context(safetensors.safe_open(str(path), framework="pt"))
                about = json.loads((file.metadata() or {})[_TREE])
            except Exception as error:
                raise CheckpointError(f"{path}, the part of rank {r}, cannot be read: {text_of(error)}") from error
            self._open[r] = file, about
        return self._open[r]

    def _about(self, r: int) -> dict[str, Any]:
        return self._handle(r)[1]

    def tensor(self, r: int, name: str) -> torch.Tensor:
        """The tensor that rank r saved as `name`, wherever it is written; in memory of its own, though equal ones are written once."""
        part, key, _ = self._about(r)["tensors"][name]
        t: torch.Tensor = self._handle(part)[0].get_tensor(key)
        if (part, key) in self._given:  # what is read twice is one place in the file's memory
            return t.clone()
        self._given.add((part, key))
        return t

    def everything(self, r: int) -> Any:
        """What rank r saved."""
        return decode(self._about(r)["tree"], lambda name: self.tensor(r, name))

    def lazily(self, r: int) -> Any:
        """What rank r saved, with `Leaf`s for tensors."""
        if r not in self._lazy:
            places = self._about(r)["tensors"]
            self._lazy[r] = decode(
                self._about(r)["tree"], lambda name: Leaf(places[name][2], lambda: self.tensor(r, name)), lambda make, leaf: leaf.then(make)
            )
        return self._lazy[r]

    def resized(self, layout: MethodState, ranks: int) -> tuple[Any, Done]:
        """What `layout`'s rank goes on from when another number of `ranks` saved, and what was done."""
        saved_size = self.manifest["size"]
        workers = self.lazily(0)["compression"].get("size", saved_size)
        if workers != saved_size or layout.size != ranks:
            raise CheckpointError(
                f"{self.folder} was saved by {saved_size} ranks, {workers} workers, and is loaded by {ranks} ranks, {layout.size} "
                "workers. Where several ranks are one worker, as many ranks must load a checkpoint as saved it, in nodes of the same size."
            )
        weights = shares(layout.rank, layout.size, saved_size)
        saved = merge([{k: v for k, v in self.lazily(r).items() if k in ("model", "optimizer")} for r in weights], list(weights.values()))
        state, done = resized_state(layout, lambda r: self.lazily(r)["compression"], saved_size)
        return {**saved, "compression": state, "extras": self.everything(next(iter(weights)))["extras"]}, done
