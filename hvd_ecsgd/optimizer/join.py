"""Workers that have no more batches: they take part in the others' steps, and in the end get what the others have."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.talk import STEP
from ..core.trees import decode, encode
from ..errors import CheckpointError, CompressionError
from .driver import OptimizerDriver
from .executor import never, wait_patiently
from .gradients import multiply_gradients_
from .note import Note
from .own_class import inner_optimizers
from .step import Outcome

__all__ = ["Note", "join"]


def join(driver: OptimizerDriver, give_up: Callable[[], bool] = never) -> int:
    """See `DistributedOptimizer`'s `join`."""
    driver.check_join()
    step = driver.step
    step.forget()
    joined_at, steps = step.aggregator.state.step, 0
    while True:
        while step.aggregator.state.local:
            _step_without_data(driver, driver.compression.attached.loss_scale)
            steps += 1
        opening = step.meeting.open(driver.note(joined_at).pack(), joined=True)
        if not wait_patiently(opening, give_up):
            return steps
        notes = [Note.unpack(note) for note in opening.notes()]
        latest = max(notes, key=lambda note: note.joined_at)
        root = notes.index(latest)
        if not {*opening.doing()} <= {"", STEP}:  # what the others wanted to do together cannot be done without this worker, as they see
            step.meeting.agree()
            continue
        if root != step.transport.rank:
            driver.hyper_parameters.adopt(latest.hyper_parameters)
            driver.scaler.adopt(latest.scale, latest.growth_tracker)
        if not latest.trains:  # nobody begins this step
            step.meeting.agree()
            break
        step.meeting.attend(joined=True)
        _step_without_data(driver, latest.scale or 1.0)
        steps += 1
    for p in driver.parameters:
        p.grad = None
    if any(note.joined_at != latest.joined_at for note in notes):
        receive_state(driver, root)
    unknown = [r for r, note in enumerate(notes) if not note.scale]
    if unknown and latest.scale:  # without this error they would go on with a scale of their own
        raise CompressionError(
            f"join(): the others' loss scale is {latest.scale:g}, and workers {', '.join(map(str, unknown))} (by rank), which took no step with "
            "their GradScaler before, cannot be given it; call optimizer.compression.attach(optimizer, scaler) on every rank at first."
        )
    return steps


def _step_without_data(driver: OptimizerDriver, scale: float) -> None:
    """A step with gradients of zero. `scale`: by which the others multiply their losses."""
    for p in driver.parameters:
        p.grad = None
    driver.synchronize()
    if driver.step.outcome is not Outcome.UNDONE and not driver.applies_update and scale != 1.0:  # there is no GradScaler.step to do it
        multiply_gradients_(driver.parameters, 1 / scale)
    with driver.skip_synchronize():
        driver.optimizer.step()


def receive_state(driver: OptimizerDriver, root: int) -> None:
    """Parameters (at x), what the method keeps alike on all workers, and the optimizer's state, from worker `root`. Collective."""
    # By name: an optimizer's own order of its parameters need not be that of the others.
    optimizer, transport = driver.optimizer, driver.step.transport
    mine, params = transport.rank == root, {driver.names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    with driver.compression.at("averaged"), torch.no_grad():
        _broadcast(driver, [*driver.parameters, *driver.state.shared()], root)
    states = list({id(o.state): o.state for o in (optimizer, *inner_optimizers(optimizer))}.values())  # some share theirs
    kept = [(which, name) for which, state in enumerate(states) for name, p in params.items() if p in state]
    held: dict[str, torch.Tensor] = {}
    said: Any = None
    if mine:
        try:
            tree = encode({str(i): dict(states[which][params[name]]) for i, (which, name) in enumerate(kept)}, "", held)
            layout = [(where, str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type == "cpu") for where, t in held.items()]
            said = [kept, tree, layout]
        except CheckpointError as error:
            said = str(error)
    packed = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
    said = json.loads(transport.allgather(packed, "join.state").wait()[root].numpy().tobytes())
    if isinstance(said, str):
        raise CompressionError(f"join(): the optimizer's state cannot be given to the workers that joined earlier; {said}")
    kept, tree, layout = said
    if not mine:
        for where, dtype, shape, on_cpu in layout:
            device = torch.device("cpu") if on_cpu else params[kept[int(where.split("/")[0])][1]].device
            held[where] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    _broadcast(driver, list(held.values()), root)
    if not mine:
        for state in states:
            for p in params.values():
                state.pop(p, None)
        for i, value in decode(tree, held.__getitem__).items():
            which, name = kept[int(i)]
            states[which][params[name]] = value


def _broadcast(driver: OptimizerDriver, tensors: Sequence[torch.Tensor], root: int) -> None:
    """Into these, which may have any layout of their elements."""
    flat = [t.detach().contiguous() for t in tensors]
    for handle in [driver.step.transport.broadcast_(f, root, f"join.{i}") for i, f in enumerate(flat)]:
        handle.wait()
    for t, f in zip(tensors, flat, strict=True):
        if f.data_ptr() != t.data_ptr():
            t.copy_(f)
        else:
            torch.autograd.graph.increment_version(t)  # a network may write behind torch's back
