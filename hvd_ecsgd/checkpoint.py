"""Checkpoints of a whole training: model, optimizer and compression state, written by all ranks together, or not at all.

A checkpoint is a directory with one safetensors file per rank (its *part*) and a `manifest.json` that names them with their checksums. Parts get new
names in every save, each is written under a temporary name and renamed, and the manifest is replaced last: whatever happens before that moment, the
directory holds the previous checkpoint. A tensor that is the same on a rank as on rank 0 is written by rank 0 alone. No code is stored or executed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from .aggregator import Aggregator
from .bound import BoundCompression
from .errors import CheckpointError, CompressionError
from .method import Method
from .resize import Done, Leaf, in_words, merge, resized_state, shares
from .transport import Transport
from .trees import decode, encode
from .version import __version__

__all__ = ["Loaded", "load_checkpoint", "save_checkpoint"]

_log = logging.getLogger("hvd_ecsgd")

FORMAT = 1
MANIFEST = "manifest.json"
_PART = "part-{id}-rank{rank:05d}.safetensors"
_TREE = "hvd_ecsgd"
"""Entry of a part's metadata: the tree of everything saved, as JSON, with tensors referred to by name."""

# What each training last saved to or loaded from each directory: another manifest there is another job's.
_ours: weakref.WeakKeyDictionary[BoundCompression, dict[Path, str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Loaded:
    """What `load_checkpoint` did."""

    step: int
    """Steps of the compression taken before the checkpoint was saved, undone ones included."""
    extras: Any
    """What was given to `save_checkpoint` as `extras` on this rank."""
    saved_size: int
    """Workers that saved it."""
    size: int
    """Workers now."""
    notes: tuple[str, ...] = ()
    """What was done to the state, slot by slot, because the number of workers is another one."""


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    compression: BoundCompression,
    *,
    extras: Any = None,
    overwrite: bool = False,
) -> None:
    """Save everything that training goes on from; every rank calls it, between two steps. Collective.

    `directory`: on a file system that all ranks share; made when missing. One directory for each (model, optimizer, compression).
    `extras`: what else to keep, per rank: numbers, strings, None, lists, tuples, dictionaries and tensors, e.g. the state of a schedule or of a
    GradScaler. `overwrite`: replace a checkpoint that another job has put there; without it that is an error.

    Raises `CheckpointError` on every rank when any rank fails (full or read-only disk, another job saving there); the previous checkpoint is then
    as it was. Needs the package safetensors (the extra `checkpoint`).
    """
    folder = Path(directory).absolute()
    transport = _checked(compression, optimizer).transport
    compression.check_between_steps("a checkpoint was saved")
    compression.check_together("save_checkpoint()")
    state = compression.state_dict()
    with compression.at("averaged"), contextlib.ExitStack() as stack:
        job = _Save(folder, transport, stack)
        job.begin(_ours.get(compression, {}).get(folder), overwrite)
        try:
            job.write_part(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "compression": state,
                    "extras": extras,
                }
            )
            job.publish(
                {
                    "format": FORMAT,
                    "library": f"hvd-ecsgd {__version__}",
                    "id": job.id,
                    "step": state["step"],
                    "size": transport.size,
                    "optimizer": type(optimizer).__name__,
                    "method": describe(compression.method),
                }
            )
        except CheckpointError:  # all ranks know of it. After anything else (a dead rank) nobody can tell whether the manifest was replaced.
            job.discard()
            raise
    _ours.setdefault(compression, {})[folder] = job.id


def load_checkpoint(
    directory: str | os.PathLike[str], model: torch.nn.Module, optimizer: torch.optim.Optimizer, compression: BoundCompression
) -> Loaded:
    """Take over what `save_checkpoint` saved, into objects made as for the saved run; every rank calls it, between two steps. Collective.

    Afterwards broadcast nothing: what differs between ranks must go on to differ. With another number of workers than saved it, the mean of the
    residuals over workers is kept (see `hvd_ecsgd.resize`), extras come from an old rank that this one inherits from, and what was done is in
    the result's `notes` and logged by rank 0. Raises `CheckpointError` on every rank when the checkpoint is
    missing, damaged, of another model, method, seed or optimizer, or of a later version, naming what is wrong; nothing in memory is changed then.
    """
    folder = Path(directory).absolute()
    transport = _checked(compression, optimizer).transport
    compression.check_together("load_checkpoint()")
    rank, size = transport.rank, transport.size
    with contextlib.ExitStack() as stack:
        with _together(transport, "load"):
            manifest = read_manifest(folder)
            saved_size = manifest["size"]
            _check_is_this_training(folder, manifest, optimizer, compression)
            parts = _Parts(folder, manifest, stack)
            for r in range(rank, saved_size, size):
                parts.verify(r)
        with _together(transport, "load"):
            done: Done = {}
            if saved_size == size:
                saved = parts.everything(rank)
            else:
                saved, done = parts.resized(compression.template())
            weights = _checked_model(model, saved["model"])
            _check_optimizer(optimizer, saved["optimizer"])
            take_over = compression.prepare_load(saved["compression"])
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved["optimizer"])
        take_over()
    _ours.setdefault(compression, {})[folder] = manifest["id"]
    notes = [] if saved_size == size else in_words(map(json.loads, _everyone(transport, json.dumps(done), "resized")))
    if saved_size != size and rank == 0:
        _log.warning("%s was saved by %d workers, and there are %d now; the state was %s.", folder, saved_size, size, "; ".join(notes) or "kept")
    return Loaded(int(saved["compression"]["step"]), saved["extras"], saved_size, size, tuple(notes))


def describe(method: Method) -> dict[str, str]:
    """The settings that a checkpoint belongs to, as text."""
    return {name: repr(getattr(method, name)) for name, f in Method.__dataclass_fields__.items() if f.repr}


# -- agreement between ranks -----------------------------------------------------------------------------------------------------


def _everyone(transport: Transport, text: str, name: str) -> list[str]:
    """Every rank's text, by rank."""
    parts = transport.allgather(torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8), f"checkpoint.{name}").wait()
    return [json.loads(bytes(p.tolist())) for p in parts]


@contextlib.contextmanager
def _together(transport: Transport, name: str) -> Iterator[None]:
    """What goes wrong inside on any rank is a `CheckpointError` on all of them, which says on which."""
    problem, cause = "", None
    try:
        yield
    except Exception as error:
        problem, cause = _text_of(error), error
    problems = _everyone(transport, problem, name)
    if any(problems):
        different = dict.fromkeys(p for p in problems if p)
        lines = [f"{text} (rank{_list([r for r, p in enumerate(problems) if p == text])})" for text in different]
        raise CheckpointError("\n".join(lines)) from cause


def _text_of(error: Exception) -> str:
    if isinstance(error, CompressionError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'checkpoint'}: {error.strerror or error}"
    return f"{type(error).__name__}: {error}"


def _list(ranks: list[int]) -> str:
    return f"{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _checked(compression: BoundCompression, optimizer: torch.optim.Optimizer) -> BoundCompression:
    if not isinstance(compression, BoundCompression):
        raise CheckpointError(
            f"compression: expected what bind() returned, or optimizer.compression, got {compression!r:.80}. Presets without state are bound too: "
            "Compression.none.bind(model)."
        )
    if getattr(optimizer, "compression", compression) is not compression:
        raise CheckpointError("the compression given is not the optimizer's; pass optimizer.compression.")
    return compression


# -- saving ----------------------------------------------------------------------------------------------------------------------


class _Save:
    """One save in progress. What it makes is removed again unless it is published."""

    def __init__(self, folder: Path, transport: Transport, stack: contextlib.ExitStack) -> None:
        self.folder, self.transport, self.stack = folder, transport, stack
        self.first = transport.rank == 0
        self.id = _everyone(transport, secrets.token_hex(8) if self.first else "", "id")[0]
        self.part = folder / _PART.format(id=self.id, rank=transport.rank)
        self.temporary = self.part.with_suffix(".tmp")
        self.reports: list[dict[str, Any]] = []

    def begin(self, ours: str | None, overwrite: bool) -> None:
        """Rank 0 looks whether the place is free, and holds it until the save is over."""
        with _together(self.transport, "begin"):
            if self.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock()
                if (self.folder / MANIFEST).exists() and not overwrite:
                    there = read_manifest(self.folder)
                    if there["id"] != ours:
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
        with _together(self.transport, "part"):
            package = _safetensors()
            tensors: dict[str, torch.Tensor] = {}
            tree = encode(everything, "", tensors)
            digests = {name: _digest(t) for name, t in tensors.items()}
        first = json.loads(_everyone(self.transport, json.dumps(digests) if self.first else "{}", "tensors")[0])
        known = {digest: (0, name) for name, digest in reversed(first.items())}
        with _together(self.transport, "part"):
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
        self.reports = [json.loads(text) for text in _everyone(self.transport, json.dumps(report), "reports")]

    def publish(self, manifest: dict[str, Any]) -> None:
        """Rank 0 looks at all parts and replaces the manifest: from then on the directory holds this checkpoint. Older parts are removed."""
        with _together(self.transport, "manifest"):
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


def _digest(t: torch.Tensor) -> str:
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
        raise CheckpointError(
            "save_checkpoint and load_checkpoint need the package safetensors: pip install safetensors."
        ) from error
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


class _Parts:
    """The parts of a checkpoint, opened when they are needed and closed with the stack."""

    def __init__(self, folder: Path, manifest: dict[str, Any], stack: contextlib.ExitStack) -> None:
        self._safetensors = _safetensors()
        self.folder, self.manifest, self._stack = folder, manifest, stack
        self._open: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._lazy: dict[int, Any] = {}

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
                raise CheckpointError(f"{path}, the part of rank {r}, cannot be read: {_text_of(error)}") from error
            self._open[r] = file, about
        return self._open[r]

    def _about(self, r: int) -> dict[str, Any]:
        return self._handle(r)[1]

    def tensor(self, r: int, name: str) -> torch.Tensor:
        """The tensor that rank r saved as `name`, wherever it is written."""
        part, key, _ = self._about(r)["tensors"][name]
        t: torch.Tensor = self._handle(part)[0].get_tensor(key)
        return t

    def everything(self, r: int) -> Any:
        """What rank r saved."""
        return decode(self._about(r)["tree"], lambda name: self.tensor(r, name))

    def lazily(self, r: int) -> Any:
        """What rank r saved, with `Leaf`s for tensors."""
        if r not in self._lazy:
            places = self._about(r)["tensors"]
            self._lazy[r] = decode(self._about(r)["tree"], lambda name: Leaf(places[name][2], lambda: self.tensor(r, name)))
        return self._lazy[r]

    def resized(self, template: Aggregator) -> tuple[Any, Done]:
        """What `template`'s rank goes on from when another number of workers saved, and what was done."""
        saved_size = self.manifest["size"]
        weights = shares(template.rank, template.size, saved_size)
        saved = merge([{k: v for k, v in self.lazily(r).items() if k in ("model", "optimizer")} for r in weights], list(weights.values()))
        state, done = resized_state(template, lambda r: self.lazily(r)["compression"], saved_size)
        return {**saved, "compression": state, "extras": self.everything(next(iter(weights)))["extras"]}, done


def _check_is_this_training(folder: Path, manifest: dict[str, Any], optimizer: torch.optim.Optimizer, compression: BoundCompression) -> None:
    saved, now = manifest["method"], describe(compression.method)
    for setting in [*now, *(s for s in saved if s not in now)]:
        if saved.get(setting) != now.get(setting):
            raise CheckpointError(
                f"{folder} was saved with another {setting}: {saved.get(setting, 'none')} then, {now.get(setting, 'none')} now. Bind with the saved "
                "settings, or start without this checkpoint."
            )
    if manifest["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(f"{folder} was saved with {manifest['optimizer']} as the optimizer, and this is {type(optimizer).__name__}.")


def _checked_model(model: torch.nn.Module, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """`saved` with the modules' format versions, which state_dict() keeps beside the values."""
    now = model.state_dict()
    for name in [*now, *(n for n in saved if n not in now)]:
        if name not in saved or name not in now:
            where = "the checkpoint, but not the model," if name in saved else "the model, but not the checkpoint,"
            raise CheckpointError(f"the checkpoint is of another model: {where} has '{name}'.")
        a, b = saved[name], now[name]
        if isinstance(b, torch.Tensor) and not (isinstance(a, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype):
            was = f"{tuple(a.shape)} {a.dtype}" if isinstance(a, torch.Tensor) else repr(a)
            raise CheckpointError(f"the checkpoint is of another model: '{name}' was {was}, and is {tuple(b.shape)} {b.dtype}.")
    result = OrderedDict(saved)
    result._metadata = getattr(now, "_metadata", {})  # type: ignore[attr-defined]
    return result


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    before, now = ([len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups))
    if before != now:
        raise CheckpointError(f"the optimizer has param groups of {now} parameters, the saved one had {before}; make it as it was.")
