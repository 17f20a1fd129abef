"""FSDP2 with replicas: shards that fully_shard has made are exchanged between groups of processes, by any method.

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
fully_shard(model, mesh=mesh["shard"])
hook = hvd_ecsgd.fsdp.register(model, Compression.double_squeeze(), mesh["replicate"])
hook.attach(optimizer)
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

try:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard
except ImportError:
    raise ImportError(
        f"hvd_ecsgd.fsdp needs FSDP2, torch.distributed.fsdp.fully_shard of torch 2.6 or newer, and this is torch {torch.__version__}; install a "
        "newer torch. All else of hvd_ecsgd runs from torch 2.2 on."
    ) from None

from .checkpoint.parts import digest_of
from .checkpoint.resize import Leaf, resized_state
from .compression import AnyCompression, bind
from .core.attached import Attached, check_plain_sgd, groups_of
from .core.bucket import Bucket
from .core.gradients import scale_of, take_
from .core.guard import Guard
from .core.step_hooks import claim
from .errors import CompressionError, SequenceError
from .optimizer.distributed import BUCKET_BYTES
from .optimizer.executor import Inline
from .optimizer.step import Phase
from .optimizer.torch_hook import TorchHook, mean_of
from .protocols import GroupSettings
from .transport.devices import Marks, marks_of, wait_for
from .transport.torch_dist import TorchTransport, takes_gpus

__all__ = ["FSDPHook", "register"]


def register(model: FSDPModule, compression: AnyCompression, replicate: DeviceMesh) -> FSDPHook:
    """Exchange the gradients of `model`'s shards over `replicate`, a mesh of one dimension, from now on. Collective. Raises as `FSDPHook` does."""
    return FSDPHook(model, compression, replicate)


class _Shard:
    """A parameter's part on this process, as the method knows it: a plain parameter over the same memory."""

    def __init__(self, name: str, whole: torch.nn.Parameter) -> None:
        tensor: Any = whole
        place, size = tensor.device_mesh.get_local_rank(), tensor.device_mesh.size()
        self.name = f"{name}.shard{place}of{size}"
        self.whole = whole
        self.part = torch.nn.Parameter(tensor.to_local().detach())
        self.written: tuple[torch.Tensor, int] | None = None
        """The mean that was written last, and its version then."""

    @property
    def grad(self) -> torch.Tensor | None:
        """The gradient's part on this process, if there is one."""
        held: Any = self.whole.grad
        return None if held is None else held._local_tensor

    @property
    def versions(self) -> tuple[int, int]:
        """Others after each write to it."""
        whole: Any = self.whole
        return whole._local_tensor._version, self.part._version

    def follow(self) -> None:
        """Be where FSDP2 keeps this shard now: it may move it when the model runs for the first time, or takes other parameters."""
        whole: Any = self.whole
        if whole._local_tensor.data_ptr() != self.part.data_ptr():
            self.part.data = whole._local_tensor.detach()

    def gradient(self) -> torch.Tensor:
        """What the backward pass has left in `grad`: of the mean over the processes that hold the other shards."""
        gradient: Any = self.whole.grad
        local: torch.Tensor = gradient.to_local()
        if self.written is not None and self.written[0] is gradient._local_tensor and gradient._local_tensor._version == self.written[1] + 1:
            raise SequenceError(
                f"the gradient of '{self.name}' was added to the mean of an earlier backward pass. Call optimizer.zero_grad() between two, and "
                "accumulate by model.set_requires_gradient_sync(False), which keeps gradients until the last pass."
            )
        return local

    def write(self, mean: torch.Tensor) -> None:
        """Put the mean over replicas in place of the gradient."""
        held: Any = self.whole.grad
        tensor: Any = self.whole
        if held is None:  # no process of this replica uses the parameter, one of another does
            self.whole.grad = held = DTensor.from_local(
                torch.zeros_like(self.part), tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        held._local_tensor.copy_(mean)
        self.written = held._local_tensor, held._local_tensor._version


class FSDPHook(TorchHook):
    """Feeds the shards' gradients to the exchange, as the backward pass of `model` reduces them, and puts the means over replicas there. Collective.

    After `backward()` the mean over all processes is in `p.grad`. Methods that apply the update themselves (`detached`, `local_momentum`, `pef`, …)
    leave this replica's own gradient there, and move the shards when the attached `torch.optim.SGD` steps. A step in which an inf or NaN comes to
    some process is undone on those with the same shard: `p.grad` is NaN then, and None once the optimizer steps; processes with other shards go on
    where it did not come to them. State is kept by parameter and shard (`'0.weight.shard1of2'`), in units of gradients that are the mean over the
    shards' processes, or of updates.

    Raises `CompressionError` where `model` was not given to `fully_shard`, or with another mesh than one of one dimension; where `replicate` is not
    the other dimension; for parameters that are no DTensors, or on a GPU without NCCL; and for methods that clip a worker's gradient.
    """

    def __init__(self, model: FSDPModule, compression: AnyCompression, replicate: DeviceMesh) -> None:
        self._shards = _shards_of(model)
        _check_replicate(self._shards[0], replicate)
        bound = bind(compression, [(s.name, s.part) for s in self._shards])
        if bound.method.clips:
            raise CompressionError(
                "register(): clip_norm and clip_value clip a worker's whole gradient, of which a process holds a shard; use clip_grad_norm_."
            )
        self._of = {id(s.part): s for s in self._shards}
        self._optimizer: torch.optim.Optimizer | None = None
        super().__init__(bound, TorchTransport.lent(replicate.get_group()), Inline(), self._settings, "FSDP2's hook")
        self._came: dict[int, torch.Tensor] = {}
        """Gradients of the step that accumulates, by part."""
        self._given: Marks = []
        self._guard = Guard(self.compression.method.feedback)
        self._gathered: list[tuple[int, int]] = []
        model.register_forward_pre_hook(self._before_forward, prepend=True)  # type: ignore[attr-defined]
        for shard in self._shards:
            shard.whole.register_post_accumulate_grad_hook(partial(self._take, shard))  # type: ignore[no-untyped-call]
        claim(self)

    # -- Driver ------------------------------------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The one that is attached."""
        return self._optimizer

    @property
    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The DTensors, by the names of their shards."""
        return [(s.name, s.whole) for s in self._shards]

    @property
    def ids(self) -> frozenset[int]:
        """Of the DTensors."""
        return frozenset(id(s.whole) for s in self._shards)

    @property
    def _applies(self) -> bool:
        return self.compression.method.feedback.takes.update

    def _waits(self) -> bool:
        return bool(self._came)

    def attach(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        """Read learning rates live from `optimizer`, which holds the DTensors; `scaler` scales the loss.

        In place of `compression.attach`, which looks for the parts that the method knows. Raises `CompressionError` where the optimizer holds none of
        the parameters, or can do what the method cannot; and after the first step where it has parameters in several param groups that were in one
        then.
        """
        method = self.compression.method
        if self._applies:
            check_plain_sgd(method, type(optimizer).step, type(optimizer).__name__)
        if not any(id(p) in self.ids for group in optimizer.param_groups for p in group["params"]):
            raise CompressionError("attach(): the optimizer holds none of the model's parameters; make it after fully_shard, of model.parameters().")
        for g, group in enumerate(optimizer.param_groups):
            if any(id(p) in self.ids for p in group["params"]):
                method.feedback.check_group(group, f"param group {g} of {type(optimizer).__name__}")
        self._step.aggregator.check_groups(self._groups_of(optimizer))
        self._optimizer = optimizer
        self.compression.scaler = scaler if scaler is not None else self.compression.scaler

    def _groups_of(self, optimizer: torch.optim.Optimizer | None) -> Callable[[torch.nn.Parameter], int]:
        """By part."""
        group_of = groups_of(optimizer)
        return lambda part: group_of(self._of[id(part)].whole)

    def _settings(self, bucket: Bucket) -> GroupSettings:
        attached: Attached = self.compression.attached
        method = self.compression.method
        if self._optimizer is None:
            return attached.settings(method, bucket)
        whole = self._of[id(bucket.parameters[0])].whole
        for g, group in enumerate(self._optimizer.param_groups):
            if any(p is whole for p in group["params"]):
                method.feedback.check_group(group, f"param group {g} of {type(self._optimizer).__name__}")
                return attached.settings_of(method, self._optimizer, g)
        raise CompressionError(f"parameter '{bucket.segments.names[0]}' is in no param group of the attached optimizer; attach another.")

    def _before_forward(self, model: torch.nn.Module, _: Any) -> None:
        """FSDP2 keeps what its outermost module has gathered until a backward pass: after an evaluation elsewhere (`compression.at`) that would be of
        another point."""
        now = [shard.versions for shard in self._shards]
        if now != self._gathered:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            self._gathered = now

    # -- FSDP2's backward pass ---------------------------------------------------------------------------------------------------

    def _take(self, shard: _Shard, _: torch.Tensor) -> None:
        """A module's reduce-scatter has put this shard's gradient into `grad`."""
        if not self._came:
            self._begin()
        elif id(shard.part) in self._came:
            raise SequenceError("a backward pass before this one was broken off, and half of its gradients were sent. Make the model and hook anew.")
        self._came[id(shard.part)] = shard.gradient()
        self._submit_ready()

    def _begin(self) -> None:
        if self._applies and self._step.phase is Phase.EXCHANGED and not self._undone:
            raise SequenceError(
                f"a second backward pass before optimizer.step(): {self.compression.method.feedback} applies what was exchanged in the first one. "
                "Accumulate by model.set_requires_gradient_sync(False), or throw the step away by hook.compression.discard(), on every rank."
            )
        self._raise_refusal()
        for shard in self._shards:
            shard.follow()
        self._step.aggregator.form_buckets(BUCKET_BYTES, self._groups_of(self._optimizer))
        self._step.begin()
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._finish)  # behind FSDP2's own, in which the gradients of its outermost modules come

    def _submit_ready(self) -> None:
        while (bucket := self._step.next_bucket) is not None and all(id(p) in self._came for p in bucket.parameters):
            state, gradients = self._step.aggregator.state, [self._came[id(p)] for p in bucket.parameters]
            if self._applies and scale_of(state, state.settings(bucket)) != 1.0:
                gradients = [g.clone() for g in gradients]  # what stays in p.grad is as the script's loss made it
            self._given += marks_of(gradients)
            self._step.submit(take_(state, bucket, gradients))

    @torch.no_grad()
    def _finish(self) -> None:
        for shard in self._shards:
            self._came.setdefault(id(shard.part), torch.zeros_like(shard.part))
        self._submit_ready()
        given, self._given = self._given, []
        wait_for(given)  # FSDP2 reduces in a stream of its own, in which this was called
        came, self._came = self._came, {}
        self._complete()
        if self._undone:
            for shard in self._shards:
                shard.write(came[id(shard.part)].fill_(float("nan")))
            return
        if self._applies:
            self._guard.note(self._shards_by_name)
            return
        for bucket, reduction in zip(self._step.aggregator.state.buckets, self._step.results, strict=True):
            shards = [self._of[id(p)] for p in bucket.parameters]
            came_of_it = mean_of(reduction)
            means = [torch.zeros_like(s.part) for s in shards] if came_of_it is None else bucket.segments.shaped_views(came_of_it)
            for shard, mean in zip(shards, means, strict=True):
                if shard.whole.grad is not None or bool(mean.any()):
                    shard.write(mean)
        self._step.aggregator.gradients_are_gone()

    # -- the optimizer's step ----------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Before the step of an optimizer that holds these parameters: it moves nothing where the step was undone or nothing came."""
        self._raise_refusal()
        if self._step.phase is not Phase.EXCHANGED:
            return
        if self._undone:
            self._let_go()
        elif self._applies:
            scaled = self.compression.attached.loss_scale  # a GradScaler may have unscaled the gradients
            self._guard.check_exchanged([1.0] if scaled == 1.0 else [1.0, 1 / scaled])
            self._step.aggregator.apply_updates(self._step.reductions)
            self._let_go()
        for reduction in self._step.reductions:
            if reduction.task.skipped:
                for part in reduction.bucket.parameters:
                    self._of[id(part)].whole.grad = None
        self._step.forget()

    @property
    def _shards_by_name(self) -> list[tuple[str, Any]]:
        """As parameters with gradients, which are plain tensors."""
        return [(s.name, s) for s in self._shards]

    def _let_go(self) -> None:
        self._guard.forget()
        for shard in self._shards:
            shard.whole.grad = None

    # -- state -------------------------------------------------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        """What only this process holds."""
        first: Any = self._shards[0].whole
        state = self._step.aggregator.state
        mesh = first.device_mesh
        return f"shard{mesh.get_local_rank()}of{mesh.size()}.replica{state.rank}of{state.size}"

    def state_dict(self) -> dict[str, Any]:
        """For `torch.distributed.checkpoint`: residuals and the like, under a name that only this process uses (`'shard1of2.replica0of2'`).

        `dcp.save({"model": …, "hook": hook.state_dict()})`. To load, `dcp.load` fills such a dictionary, which goes to `load_state_dict`.
        """
        packed = io.BytesIO()
        torch.save(self.compression.state_dict(), packed)
        return {self._key: packed.getvalue()}

    def state_to_load(self, checkpoint_id: str | os.PathLike[str]) -> dict[str, Any]:
        """For `dcp.load` to fill, in place of `state_dict()`, from a checkpoint that perhaps another number of replicas has saved: what all of them
        have kept of this process's shard. Raises `CompressionError` where it was cut in another number of shards."""
        found: Any = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
        names = [name.rpartition("shard") for name in found if _KEY.search(name)]
        return dict.fromkeys(self._keys_in([f"shard{rest}" for *_, rest in names]), b"")

    def _keys_in(self, names: Iterable[str]) -> list[str]:
        """The names of this shard's replicas, in their order: this process's alone where there are as many. Raises `CompressionError` where they are
        not there."""
        told = sorted(names)
        if self._key in told:
            return [self._key]
        state, shard = self._step.aggregator.state, self._key.partition(".")[0]
        mine = {int(m["replica"]): (int(m["replicas"]), name) for name in told if (m := _KEY.fullmatch(name)) is not None and m["shard"] == shard}
        sizes = {size for size, _ in mine.values()}
        if len(sizes) != 1 or sorted(mine) != list(range(*sizes)) or sizes == {state.size}:
            raise CompressionError(
                f"load_state_dict(): '{self._key}' is not in the state, which holds {', '.join(told) or 'nothing'}. Residuals belong to a part of "
                "each parameter: load with as many shards as saved it, and with as many replicas or the parts of all of them (state_to_load), or "
                "start without this state."
            )
        return [mine[r][1] for r in range(*sizes)]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned on the same process of as many; or what all replicas of another number have kept of this shard, which
        is cut anew so that the mean over replicas stays. Raises `CompressionError` where that is not there, or does not fit."""
        saved = [torch.load(io.BytesIO(state[key]), weights_only=True) for key in self._keys_in(state)]
        if len(saved) == 1 and self._key in state:
            self.compression.load_state_dict(saved[0])
            return
        leaves = [_as_leaves(one) for one in saved]
        resized, _ = resized_state(self._step.aggregator.state, leaves.__getitem__, len(leaves))
        self.compression.load_state_dict(resized)


_KEY = re.compile(r"(?P<shard>shard\d+of\d+)\.replica(?P<replica>\d+)of(?P<replicas>\d+)$")


def _as_leaves(state: Any) -> Any:
    """A saved state for `resized_state`."""
    if isinstance(state, dict):
        return {key: _as_leaves(value) for key, value in state.items()}
    return Leaf(digest_of(state), lambda: state) if isinstance(state, torch.Tensor) else state


def _shards_of(model: FSDPModule) -> list[_Shard]:
    """Of all trained parameters that are not empty on this process."""
    if not isinstance(model, FSDPModule) or not isinstance(model, torch.nn.Module):
        raise CompressionError(f"register(): expected a module after fully_shard, got a {type(model).__name__}. Call fully_shard first.")
    found = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        tensor: Any = p
        if not isinstance(tensor, DTensor):
            raise CompressionError(f"register(): parameter '{name}' is no DTensor, so fully_shard left it out, and nothing exchanges its gradient.")
        if tensor.device_mesh.ndim != 1 or not isinstance(tensor.placements[0], Shard):
            raise CompressionError(
                f"register(): parameter '{name}' lies on {tensor.device_mesh} as {tensor.placements}, and torch exchanges it between replicas by "
                "itself. Give fully_shard the mesh of one dimension: fully_shard(model, mesh=mesh['shard'])."
            )
        if tensor.device.type != "cpu" and not (tensor.device.type == "cuda" and takes_gpus()):
            raise CompressionError(
                f"register(): parameter '{name}' is on {tensor.device}; the hook exchanges over gloo, for models on the CPU, or over NCCL: "
                "init_process_group('cpu:gloo,cuda:nccl')."
            )
        if p.grad is not None or getattr(p, "_post_accumulate_grad_hooks", None):
            raise CompressionError(f"register(): parameter '{name}' has a gradient or a hook already. Register once, before the first backward pass.")
        if tensor.to_local().numel():
            found.append(_Shard(name, p))
    return found


def _check_replicate(shard: _Shard, replicate: DeviceMesh) -> None:
    tensor: Any = shard.whole
    if not isinstance(replicate, DeviceMesh) or replicate.ndim != 1:
        raise CompressionError(f"register(): expected the mesh of replicas, of one dimension (mesh['replicate']), got {replicate!r:.100}.")
    ranks = [set(dist.get_process_group_ranks(mesh.get_group())) for mesh in (tensor.device_mesh, replicate)]
    if ranks[0] & ranks[1] != {dist.get_rank()}:
        raise CompressionError(
            f"register(): this process, {dist.get_rank()}, shares a replica with {sorted(ranks[0])}, and its replicas are to be {sorted(ranks[1])}. "
            "Give the other dimension of the same mesh: mesh['replicate']."
        )
