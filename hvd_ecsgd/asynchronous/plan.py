"""What workers and servers hold in common: the method of both ways, who serves which parameter, and how payloads are decoded on either side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..arguments import check_flag, check_integer
from ..compressors import Identity
from ..core.bucket import Bucket
from ..core.method import Method
from ..core.state import MethodState, NamedParameters
from ..errors import CompressionError
from ..exchange import AllGather, AllReduce, Central, TwoPass
from ..optimizer.own_class import OwnClass
from ..protocols import NO_SEGMENTS, Compressor, Role, Takes, decode_sum_
from ..segments import Key

__all__ = ["Plan", "check_rule", "dense_gradient", "plan_of", "shards_of"]

_BUCKET_BYTES = 2**62
"""One bucket of each kind: there is nothing that it could travel beside."""
_BOTH_WAYS = (TwoPass, Central)
"""Exchanges that say what the servers compress with."""
_ONE_WAY = (AllReduce, AllGather)
"""Exchanges that do not: servers answer uncompressed."""


@dataclass(frozen=True)
class Plan:
    """`method`: of gradients on their way to the servers. `down`: what compresses the way back. `workers`: how many there are. `tau_max`: how many
    updates x may take between the moment when a worker was given it and the one when the gradient there is applied, at most. `share`: what the
    learning rate is multiplied by at each push, 1/workers for a mean and 1 for a sum. `reuse`: a step is taken with the last gradients of all
    workers, of which one is new, in place of that one alone (Q-IAG)."""

    method: Method
    down: Compressor
    workers: int
    tau_max: int
    share: float
    reuse: bool = False

    def record(self, named: NamedParameters, optimizer: torch.optim.Optimizer, worker: int = 0) -> MethodState:
        """The record of a shard, of the same layout on the server and on every worker. Nothing is allocated yet."""
        group_of = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        return MethodState(
            self.method, named, rank=worker, size=self.workers, bucket_bytes=_BUCKET_BYTES, group_of=lambda parameter: group_of[id(parameter)]
        )

    def share_of(self, living: int) -> float:
        """What the learning rate is multiplied by at each push where only so many workers live: of a mean each of them has its part."""
        return 1.0 if self.share == 1.0 else 1 / living

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise `CompressionError` for one that servers cannot run: gradients come one at a time, and dense."""
        OwnClass(type(optimizer)).check_evaluates_once()
        if isinstance(optimizer, torch.optim.SparseAdam):
            raise CompressionError("asynchronous training: SparseAdam takes sparse gradients, and servers have dense ones. Use Adam.")
        without = [g for g, group in enumerate(optimizer.param_groups) if "lr" not in group]
        if self.share != 1.0 and without:
            raise CompressionError(
                f"asynchronous training: param group {without[0]} of {type(optimizer).__name__} has no learning rate, of which each push should "
                f"take one {self.workers}th. Use op=Sum, or an optimizer with an lr."
            )

    def up(self, bucket: Bucket, number: int) -> Compressor:
        """What compresses the push of this number of a worker."""
        return bucket.method.at(number)[0]

    def back(self, bucket: Bucket) -> Compressor:
        """What compresses answers."""
        return Identity() if bucket.dense else self.down

    def key(self, compressor: Compressor, stage: str, number: int, worker: int) -> Key:
        """Of the payload of this number between a worker and a server; workers draw alike where the compressor shares its draws."""
        return Key(self.method.seed, number, None if compressor.shared_key else worker, stage, self.workers)

    def move_(self, targets: Sequence[torch.Tensor], bucket: Bucket, payload: torch.Tensor, number: int, worker: int) -> None:
        """targets −= C⁻¹(payload): the worker's x, and what the server holds of it. The same operations on both sides, so the bits are the same."""
        compressor, out = self.back(bucket), bucket.segments.empty()
        decode_sum_(out, compressor, bucket.segments, [(payload, self.key(compressor, "pull", number, worker))])
        torch._foreach_sub_(list(targets), bucket.segments.shaped_views(out))


def check_rule(method: Method, what: str) -> None:
    """Raise `CompressionError` for a method that cannot be used by workers of which some are steps behind; `what` is done with it."""
    rule, exchange = method.feedback, method.exchange
    roles = {slot.role for slot in rule.slots(NO_SEGMENTS).values()}
    if rule.unit != "gradient" or rule.takes is not Takes.NOTHING or not roles <= {Role.RESIDUAL}:
        raise CompressionError(
            f"{what}: expected a method with error feedback in gradient units, or without feedback, got {rule}: workers hold the x that all others "
            "or servers know, so a method must neither shift the model nor keep momentum nor apply the update. Use double_squeeze(), "
            "top_k(), one_bit(), qsgd() or such; momentum is the optimizer's."
        )
    if type(exchange) not in _BOTH_WAYS + _ONE_WAY:
        raise CompressionError(
            f"{what}: expected an exchange in which payloads travel as they are (AllReduce, AllGather, TwoPass, Central), got "
            f"{exchange}, which is something that all workers do together. Use Compression(compressor), or "
            "double_squeeze(compressor, server_compressor)."
        )


def plan_of(
    method: Method,
    workers: int,
    tau_max: int | None = None,
    server_compressor: Compressor | None = None,
    mean: bool = True,
    reuse: bool = False,
) -> Plan:
    """`method` as asynchronous training uses it: its compressor and feedback on the way to the servers; on the way back `server_compressor`, or the
    server's compressor of a two-pass method, or none.

    `tau_max`: 4 · workers by default. `reuse`: as in `Plan`; for methods without feedback, since what is used again and again must be a gradient, and
    not what was left of others beside it. Raises `CompressionError` for what cannot be done asynchronously: a method that shifts the model, has
    momentum or applies the update; an exchange that is a collective of its own (skips, low rank, resets); a compressor that diverges with feedback.
    """
    check_integer(workers, "workers", "a number of workers ≥ 1: some rank must be left to train", least=1)
    if tau_max is not None:
        check_integer(tau_max, "tau_max", "a number of updates ≥ 0, or None for 4 times as many as there are workers", least=0)
    check_rule(method, "asynchronous training")
    check_flag(reuse, "reuse")
    if reuse and method.stateful:
        raise CompressionError(
            f"reuse=True: expected a method without feedback, as the servers use a worker's last gradient again until the next one comes, got "
            f"{method.feedback}, with which a payload also holds what was left of earlier ones. Use qsgd(), natural(), unbiased(compressor), or none."
        )
    exchange = method.exchange
    if type(exchange) in _BOTH_WAYS:
        if not exchange.server_feedback:  # type: ignore[attr-defined]
            raise CompressionError(
                "asynchronous training: expected server_feedback=True, got False: what a server has not sent to a worker yet is the difference "
                "between its x and the worker's, which cannot be forgotten."
            )
        own = exchange.server_compressor  # type: ignore[attr-defined]
        down = server_compressor or own or method.compressor
    else:
        down = server_compressor or Identity()
    if not isinstance(down, Compressor) or isinstance(down, type):
        raise CompressionError(f"server_compressor: expected an instance from hvd_ecsgd.compressors, or None, got {down!r:.100}.")
    if not down.lossless:
        down.check_feedback()
    one_way = replace(method, exchange=AllGather())
    return Plan(one_way, down, workers, 4 * workers if tau_max is None else tau_max, 1 / workers if mean else 1.0, reuse)


def shards_of(named: NamedParameters, servers: int) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """By server, the parameters that it serves, in their order: the largest first to whoever has least. Equal on all ranks.

    Raises `CompressionError` when there are fewer parameters than servers.
    """
    if not 1 <= servers <= len(named):
        raise CompressionError(
            f"asynchronous training: {servers} ranks serve, and there are {len(named)} parameters that are trained; each server needs one at least, "
            "so start the job with fewer servers (--servers, MPI_BACKEND_SERVERS, init(servers=…)), and one at least."
        )
    load, owner = [0] * servers, {}
    for i in sorted(range(len(named)), key=lambda i: (-named[i][1].numel(), i)):
        owner[i] = least = min(range(servers), key=lambda s: (load[s], s))
        load[least] += max(1, named[i][1].numel())
    return [[pair for i, pair in enumerate(named) if owner[i] == s] for s in range(servers)]


def dense_gradient(p: torch.nn.Parameter) -> torch.Tensor:
    """The gradient; zeros where there is none."""
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad.to_dense() if p.grad.layout is not torch.strided else p.grad
