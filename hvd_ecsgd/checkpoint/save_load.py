"""Checkpoints of a whole training: model, optimizer and compression state, written by all ranks together, or not at all.

A checkpoint is a directory with one safetensors file per rank (its *part*) and a `manifest.json` that names them with their checksums. Parts get new
names in every save, each is written under a temporary name and renamed, and the manifest is replaced last: whatever happens before that moment, the
directory holds the previous checkpoint. A tensor that is the same on a rank as on rank 0 is written by rank 0 alone. No code is stored or executed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.bound import BoundCompression
from ..core.talk import everyone, together
from ..errors import CheckpointError
from ..version import __version__
from .parts import FORMAT, Parts, Save, read_manifest
from .resize import Done, in_words

__all__ = ["Loaded", "load_checkpoint", "save_checkpoint"]

_log = logging.getLogger("hvd_ecsgd")

EXTRA_STATE = "_extra_state"
"""The last part of a name that a module's `get_extra_state` has in its `state_dict()`."""

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
    `extras`: what else to keep, per rank: numbers, strings, bytes, None, lists, tuples, dictionaries, tensors, and NumPy's numbers and arrays, e.g.
    the state of a schedule, of a GradScaler, or of a generator (`random.getstate()`). They come back as the types they were, with the same bits;
    subclasses of Python's own types come back as those. `overwrite`: replace a checkpoint that another job has put there; without it that is an
    error.

    Raises `CheckpointError` on every rank when any rank fails (full or read-only disk, another job saving there); the previous checkpoint is then
    as it was. Needs the package safetensors (the extra `checkpoint`).
    """
    folder = Path(directory).absolute()
    transport = _checked(model, optimizer, compression).transport
    compression.check_between_steps("a checkpoint was saved")
    compression.check_together("save_checkpoint")
    state = compression.state_dict()
    with compression.at("averaged"), contextlib.ExitStack() as stack:
        job = Save(folder, transport, stack)
        job.begin({_ours.get(compression, {}).get(folder, "")}, overwrite)
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
                    "method": compression.method.settings(),
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
    residuals over workers is kept (see `hvd_ecsgd.checkpoint.resize`), extras come from an old rank that this one inherits from, and what was done
    is in the result's `notes` and logged by rank 0. Raises `CheckpointError` on every rank when the checkpoint is missing, damaged, of another
    model, method, seed or optimizer, or of a later version, or when a tensor of the model cannot be written to, naming what is wrong; nothing in
    memory is changed then. Only where a module's or an optimizer's own loading code fails, it says that memory holds a part.
    """
    folder = Path(directory).absolute()
    transport = _checked(model, optimizer, compression).transport
    compression.check_between_steps("a checkpoint was loaded")
    compression.check_together("load_checkpoint")
    rank, size = transport.rank, transport.size
    with torch.inference_mode(False), contextlib.ExitStack() as stack:  # what is made here is trained on
        with together(transport, "checkpoint.load"):
            manifest = read_manifest(folder)
            saved_size = manifest["size"]
        compression.go_on_as(lambda method: method.settings() == manifest["method"])
        with together(transport, "checkpoint.load"):
            _check_is_this_training(folder, manifest, optimizer, compression)
            parts = Parts(folder, manifest, stack)
            for r in range(rank, saved_size, size):
                parts.verify(r)
        with together(transport, "checkpoint.load"):
            done: Done = {}
            if saved_size == size:
                saved = parts.everything(rank)
            else:
                saved, done = parts.resized(compression.layout(), size)
            weights = _checked_model(model, saved["model"])
            _check_optimizer(optimizer, saved["optimizer"])
            take_over = compression.prepare_load(saved["compression"])
        with together(transport, "checkpoint.taken"), _half_way(folder):
            model.load_state_dict(weights)
            optimizer.load_state_dict(saved["optimizer"])
            take_over()
    _ours.setdefault(compression, {})[folder] = manifest["id"]
    notes = [] if saved_size == size else in_words(everyone(transport, done, "checkpoint.resized"))
    if saved_size != size and rank == 0:
        _log.warning("%s was saved by %d workers, and there are %d now; the state was %s.", folder, saved_size, size, "; ".join(notes) or "kept")
    return Loaded(int(saved["compression"]["step"]), saved["extras"], saved_size, size, tuple(notes))


def _checked(model: torch.nn.Module, optimizer: torch.optim.Optimizer, compression: BoundCompression) -> BoundCompression:
    if not isinstance(compression, BoundCompression):
        raise CheckpointError(
            f"compression: expected what bind() returned, or optimizer.compression, got {compression!r:.80}. Presets without state are bound too: "
            "Compression.none.bind(model)."
        )
    if getattr(optimizer, "compression", compression) is not compression:
        raise CheckpointError("the compression given is not the optimizer's; pass optimizer.compression.")
    if not isinstance(model, torch.nn.Module):
        raise CheckpointError(
            f"model: expected the torch.nn.Module that is trained, got {model!r:.80}. The order is directory, model, optimizer, compression."
        )
    bound = {id(p) for _, p in compression.named}
    if not any(id(p) in bound for p in model.parameters()):
        raise CheckpointError(
            f"model: this {type(model).__name__} holds none of the parameters that the compression is bound to ('{compression.named[0][0]}', …). "
            "Give the model that is trained, not a copy or an average of it: what the compression holds back belongs to those weights."
        )
    return compression


def _check_is_this_training(folder: Path, manifest: dict[str, Any], optimizer: torch.optim.Optimizer, compression: BoundCompression) -> None:
    saved, now = manifest["method"], compression.method.settings()
    for setting in [*now, *(s for s in saved if s not in now)]:
        if saved.get(setting) != now.get(setting):
            raise CheckpointError(
                f"{folder} was saved with another {setting}: {saved.get(setting, 'none')} then, {now.get(setting, 'none')} now. Bind with the saved "
                "settings, or start without this checkpoint."
            )
    if manifest["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(f"{folder} was saved with {manifest['optimizer']} as the optimizer, and this is {type(optimizer).__name__}.")


def _checked_model(model: torch.nn.Module, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """`saved` with the modules' format versions, which state_dict() keeps beside the values; every tensor of it fits, and can be written."""
    now = model.state_dict(keep_vars=True)
    for name in [*now, *(n for n in saved if n not in now)]:
        if name not in saved or name not in now:
            where = "the checkpoint, but not the model," if name in saved else "the model, but not the checkpoint,"
            raise CheckpointError(f"the checkpoint is of another model: {where} has '{name}'.")
        a, b = saved[name], now[name]
        if name.rpartition(".")[2] == EXTRA_STATE:  # any object, which its module takes as it is
            continue
        if isinstance(b, torch.Tensor) and not (isinstance(a, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype):
            was = f"{tuple(a.shape)} {a.dtype}" if isinstance(a, torch.Tensor) else repr(a)
            raise CheckpointError(f"the checkpoint is of another model: '{name}' was {was}, and is {tuple(b.shape)} {b.dtype}.")
        if isinstance(b, torch.Tensor):
            _check_can_be_written(name, b)
    result = OrderedDict(saved)
    result._metadata = getattr(now, "_metadata", {})  # type: ignore[attr-defined]
    return result


def _check_can_be_written(name: str, t: torch.Tensor) -> None:
    """Raise `CheckpointError` where `t.copy_` would fail, when tensors before it were written already."""
    if t.is_meta:
        raise CheckpointError(f"'{name}' is on the meta device and has no memory; give it some by model.to_empty(…) first.")
    if t.is_inference():
        raise CheckpointError(f"'{name}' was made inside torch.inference_mode() and cannot be written to outside of it; make the model outside.")
    if t.numel() > 0 and any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
        raise CheckpointError(
            f"'{name}' is an expanded tensor, of which several elements are one place in memory (shape {tuple(t.shape)}, strides {t.stride()}), and "
            "cannot be written to; make it a tensor of its own (.clone()) before."
        )


@contextlib.contextmanager
def _half_way(folder: Path) -> Iterator[None]:
    """All that can be told beforehand has been looked at. What a module's or an optimizer's own loading raises still comes too late."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{folder} was taken over in part only, as loading code of the model or optimizer failed ({type(error).__name__}: {error}). Do not go on "
            "from what is in memory now: mend that and load again, or start anew."
        ) from error


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    before, now = ([len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups))
    if before != now:
        raise CheckpointError(f"the optimizer has param groups of {now} parameters, the saved one had {before}; make it as it was.")
