"""Checkpoints of an asynchronous training: files as of `hvd_ecsgd.checkpoint`, a part of each worker and of each server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.parts import FORMAT, Parts, Save, read_manifest
from ..core.talk import everyone, together
from ..errors import CheckpointError
from ..transport import Transport
from ..version import __version__
from .plan import Plan
from .server import Server
from .worker import Worker

__all__ = ["Restored", "load", "save", "saved_by_server", "saved_by_worker"]


@dataclass(frozen=True)
class Restored:
    """What `load` did. `version`: updates of x on the first server. `extras`: what this worker gave to `save`; None of a worker that was not there
    then. `notes`: what began anew, as there are other workers or servers now."""

    version: int
    extras: Any
    notes: tuple[str, ...] = ()
    id: str = ""


def saved_by_worker(worker: Worker, model: torch.nn.Module, extras: Any, transport: Transport, servers: int) -> dict[str, Any]:
    """What goes into a worker's part, by its place among the workers that live. It holds x exactly."""
    state = _numbered(worker.state_dict(), transport.rank, transport.size - servers)
    return {"model": model.state_dict(), "worker": state, "extras": extras}


def _numbered(state: Mapping[str, Any], rank: int, workers: int) -> dict[str, Any]:
    """A worker's state as that of worker `rank` of so many."""
    return {**state, "shards": [{**shard, "rank": rank, "size": workers} for shard in state["shards"]]}


def saved_by_server(server: Server) -> dict[str, Any]:
    """What goes into a server's part: x and the optimizer's state of its parameters, by name."""
    names = {id(p): name for name, p in server.state.named}
    moments = {names[id(p)]: s for p, s in server.optimizer.state.items() if id(p) in names}
    x = {name: p.detach() for name, p in server.state.named}
    return {"server": server.state_dict(), "x": x, "moments": moments}


def save(
    folder: Path, transport: Transport, plan: Plan, servers: int, optimizer: str, everything: Any, version: int, ours: set[str], overwrite: bool
) -> str:
    """All workers that live and the servers write their parts, and the manifest is replaced last. Raises `CheckpointError` on all when any fails.
    `ours`: ids of the checkpoints that this training last saved there, or loaded. The new one's is added when there was room for it, as a worker that
    dies later may have left it there; it is returned."""
    with contextlib.ExitStack() as stack:
        job = Save(folder, transport, stack)
        job.begin(ours, overwrite)
        ours.add(job.id)
        try:
            job.write_part(everything)
            versions = everyone(transport, version, "checkpoint.version")
            job.publish(
                {
                    "format": FORMAT,
                    "library": f"hvd-ecsgd {__version__}",
                    "id": job.id,
                    "step": max(versions),
                    "size": transport.size,
                    "optimizer": optimizer,
                    "method": _settings(plan),
                    "asynchronous": {"workers": transport.size - servers, "servers": servers},
                }
            )
        except CheckpointError:
            job.discard()
            raise
    return str(job.id)


def load(
    folder: Path,
    transport: Transport,
    plan: Plan,
    servers: int,
    optimizer: torch.optim.Optimizer,
    side: Worker | Server,
    model: torch.nn.Module | None = None,
) -> Callable[[], Restored]:
    """What takes over what `save` wrote, when it is called, once this is done on all; workers give their `model`. x, and the optimizer's state, go to
    whoever serves each parameter now. With another number of workers or servers residuals begin anew, with zeros. Raises `CheckpointError` on all
    when anything is missing, damaged or does not fit. Nothing is changed."""
    with contextlib.ExitStack() as stack:
        with together(transport, "checkpoint.load"):
            manifest = read_manifest(folder)
            was = manifest.get("asynchronous")
            if not isinstance(was, Mapping) or not {"workers", "servers"} <= set(was) or was["workers"] + was["servers"] != manifest["size"]:
                raise CheckpointError(f"{folder} was not saved by an asynchronous training: load_checkpoint reads it.")
            _check_settings(folder, manifest, plan, type(optimizer).__name__)
            parts = Parts(folder, manifest, stack)
            for r in range(transport.rank, manifest["size"], transport.size):
                parts.verify(r)
        same = (was["workers"], was["servers"]) == (transport.size - servers, servers)
        with together(transport, "checkpoint.taken"):
            if isinstance(side, Worker):
                assert model is not None
                take_over = _for_worker(parts, was["workers"], transport.rank, same, side, model)
            else:
                take_over = _for_server(parts, range(was["workers"], manifest["size"]), transport.rank if same else None, side)
    return take_over


def _for_worker(parts: Parts, workers: int, place: int, same: bool, worker: Worker, model: torch.nn.Module) -> Callable[[], Restored]:
    there = place < workers
    own = parts.everything(place if there else 0)
    now = model.state_dict()
    for name in [*now, *(n for n in own["model"] if n not in now)]:
        a, b = own["model"].get(name), now.get(name)
        if getattr(a, "shape", None) != getattr(b, "shape", None) or (name in now) != (name in own["model"]):
            raise CheckpointError(f"the checkpoint is of another model: '{name}' does not fit.")
    notes = () if same else ("residuals begin with zeros, as there are other workers or servers than those that saved it",)
    take = worker.prepare_load(_numbered(own["worker"], worker.worker, worker.plan.workers)) if same else worker.begin_anew

    def take_over() -> Restored:
        take()
        model.load_state_dict(own["model"])
        return Restored(0, own["extras"] if there else None, notes, parts.manifest["id"])

    return take_over


def _for_server(parts: Parts, saved: Sequence[int], own_part: int | None, server: Server) -> Callable[[], Restored]:
    x: dict[str, torch.Tensor] = {}
    moments: dict[str, Any] = {}
    counters = []
    for r in saved:
        part = parts.everything(r)
        x |= part["x"]
        moments |= part["moments"]
        counters.append(part["server"])
    for name, p in server.state.named:
        if name not in x or x[name].shape != p.shape or x[name].dtype != p.dtype:
            raise CheckpointError(f"the checkpoint is of another model: the trained parameter '{name}' does not fit.")
    begins = {"version": max(c["version"] for c in counters), "pushes": [], "answers": []}

    @torch.no_grad()
    def take_over() -> Restored:
        for name, p in server.state.named:
            p.copy_(x[name])
            server.optimizer.state.pop(p, None)
            if name in moments:
                server.optimizer.state[p] = dict(moments[name])
        server.load_state_dict(begins if own_part is None else counters[list(saved).index(own_part)])
        return Restored(server.version, None, id=parts.manifest["id"])

    return take_over


def _settings(plan: Plan) -> dict[str, str]:
    return {**plan.method.settings(), "server_compressor": repr(plan.down), **({"reuse": "True"} if plan.reuse else {})}


def _check_settings(folder: Path, manifest: Mapping[str, Any], plan: Plan, optimizer: str) -> None:
    now, saved = _settings(plan), manifest["method"]
    for setting in [*now, *(s for s in saved if s not in now)]:
        if saved.get(setting) != now.get(setting):
            raise CheckpointError(
                f"{folder} was saved with another {setting}: {saved.get(setting, 'none')} then, {now.get(setting, 'none')} now. Start with the saved "
                "settings, or without this checkpoint."
            )
    if manifest["optimizer"] != optimizer:
        raise CheckpointError(f"{folder} was saved with {manifest['optimizer']} as the optimizer, and this is {optimizer}.")
