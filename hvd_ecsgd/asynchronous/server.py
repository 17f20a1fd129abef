"""The server's side: it holds x, runs the optimizer, and knows what every worker holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from ..core.state import NamedParameters
from ..errors import SequenceError, TransportError
from ..optimizer.hyper_parameters import HyperParameters
from ..protocols import decode_sum_
from .messages import Kind, Message
from .plan import Plan

__all__ = ["Server"]


class Server:
    """Holds x of the parameters `named`, which are those of this process's own model, and moves it by `optimizer` as gradients arrive.

    It keeps what every worker holds (`views`: workers × the shard's elements of memory; as much for `last`, where gradients are used again), so
    what it has not sent to a worker yet is view − x. Every event returns the messages that are to be sent now, in this order.

    A gradient is *in flight* from the moment when its worker is given x to the one when it arrives. A worker is given x only if afterwards, for
    every gradient in flight, the updates of x since then and the other gradients in flight are at most τ_max together: whatever order they arrive
    in, none is staler than τ_max when it does, and no gradient that has been computed waits. While anything is in flight somebody will push, so
    the first in the queue gets its turn. Of several servers each counts for itself; a worker pulls from one after the other, in their order, so two
    that wait never wait for each other.
    """

    def __init__(self, plan: Plan, named: NamedParameters, optimizer: torch.optim.Optimizer) -> None:
        plan.check_optimizer(optimizer)
        self.plan, self.optimizer = plan, optimizer
        self.state = plan.record(named, optimizer)
        self.version = 0
        """Updates that x has taken."""
        self.views: dict[int, list[list[torch.Tensor]]] = {}
        """By worker and bucket: its x, parameter by parameter."""
        self.in_flight: dict[int, int] = {}
        """By worker that computes a gradient: the version of x that it was given."""
        self.waiting: deque[tuple[int, Kind]] = deque()
        """Workers that ask for x, in the order in which they came."""
        self.done: set[int] = set()
        """Workers that will not come again."""
        self.lost: set[int] = set()
        """Workers that have died."""
        self.staleness: dict[int, int] = {}
        """By staleness, how many gradients were applied with it."""
        self.applied: dict[int, int] = {}
        """By worker that has not been answered since its gradient was applied: the staleness that this had."""
        self.last: dict[int, list[torch.Tensor]] = {}
        """By worker and bucket: its last gradient, where that is used again."""
        self.pushes = [0] * plan.workers
        self.answers = [0] * plan.workers
        self._hyper_parameters = HyperParameters(optimizer)
        self._places = {name: i for i, (name, _) in enumerate(named)}

    # -- events ------------------------------------------------------------------------------------------------------------------

    def on(self, message: Message) -> list[Message]:
        """Whatever a worker sent, but for SAVE, LOAD and LOST, which the driver does. Raises `TransportError` for what cannot be. What comes of a
        worker after it was lost changes nothing: the others may hold an x without it, and go on from there together."""
        worker = message.worker
        if worker in self.lost:
            return []
        if not 0 <= worker < self.plan.workers or worker in self.done:
            raise TransportError(f"asynchronous training: a message of worker {worker}, which is none of the {self.plan.workers} that are there.")
        if message.kind is Kind.PUSH:
            return self.on_push(message)
        if message.kind in (Kind.PULL, Kind.PULL_EXACT):
            return self.on_pull(worker, message.kind)
        if message.kind is Kind.FETCH:
            return [self._exact(worker)]
        if message.kind is Kind.LEAVE:
            return self.on_leave(worker)
        if message.kind is Kind.DONE:
            return self.on_done(worker)
        raise TransportError(f"asynchronous training: worker {worker} sent {message.kind.name}, which servers send.")

    @torch.no_grad()
    def on_push(self, push: Message) -> list[Message]:
        """A gradient has arrived: it is applied, and others may be given x now.

        Raises `SequenceError` for a worker that was not given x, or whose push is not the next one; `CompressionError` for payloads of another size
        than the compressor makes, and `TransportError` for those that are not finite: nothing is changed then.
        """
        worker = push.worker
        if worker not in self.in_flight:
            raise SequenceError(f"asynchronous training: worker {worker} pushed a gradient without having pulled x.")
        if push.number != self.pushes[worker]:
            raise SequenceError(f"asynchronous training: push {push.number} of worker {worker} came, and {self.pushes[worker]} was expected.")
        if len(push.payloads) != len(self.state.buckets):
            raise TransportError(
                f"asynchronous training: a push of worker {worker} has {len(push.payloads)} payloads for {len(self.state.buckets)} buckets: all "
                "ranks must hold the same model and settings."
            )
        gradients = self._decoded(push)
        staleness = self.version - self.in_flight.pop(worker)
        self.applied[worker] = staleness
        self.staleness[staleness] = self.staleness.get(staleness, 0) + 1
        self.pushes[worker] += 1
        self._step(push, self._with_last(worker, gradients) if self.plan.reuse else gradients)
        self.version += 1
        return self._admit()

    def on_pull(self, worker: int, kind: Kind = Kind.PULL) -> list[Message]:
        """A worker asks for x. What it was given before is no longer in flight: it has refused that gradient, or left it."""
        self.in_flight.pop(worker, None)
        self._forget(worker)
        self.waiting.append((worker, kind))
        return self._admit()

    def on_leave(self, worker: int) -> list[Message]:
        """A worker computes nothing for a while, so nobody need wait for it."""
        self.in_flight.pop(worker, None)
        self._forget(worker)
        return self._admit()

    def on_done(self, worker: int) -> list[Message]:
        """A worker will not come again: what it holds is forgotten."""
        self.done.add(worker)
        return self._let_go(worker)

    def on_lost(self, worker: int) -> list[Message]:
        """A worker has died: what it holds is forgotten, nobody waits for it any more, and of a mean each of the others has a larger part from here
        on. What it pushed has moved x, and stays. Nothing happens for one that is done, or lost already."""
        if worker in self.done or worker in self.lost:
            return []
        self.lost.add(worker)
        return self._let_go(worker)

    def _let_go(self, worker: int) -> list[Message]:
        self.views.pop(worker, None)
        self.last.pop(worker, None)
        self.applied.pop(worker, None)
        return self.on_leave(worker)

    @property
    def living(self) -> list[int]:
        """Workers that have not died; those that are done are among them."""
        return [worker for worker in range(self.plan.workers) if worker not in self.lost]

    @property
    def finished(self) -> bool:
        """No worker will come again."""
        return len(self.done) == len(self.living)

    def held_back(self) -> dict[int, list[int]]:
        """By worker that waits: those for whose gradients it does."""
        return {worker: sorted(self.in_flight) for worker, _ in self.waiting}

    # -- x goes to workers -------------------------------------------------------------------------------------------------------

    def _forget(self, worker: int) -> None:
        self.waiting = deque((w, kind) for w, kind in self.waiting if w != worker)

    def _admit(self) -> list[Message]:
        answers = []
        while self.waiting and self._may_go(others=list(self.in_flight.values())):
            worker, kind = self.waiting.popleft()
            self.in_flight[worker] = self.version
            answers.append(self._exact(worker) if kind is Kind.PULL_EXACT or worker not in self.views else self._move(worker))
        return answers

    def _may_go(self, others: list[int]) -> bool:
        return all(self.version - given + len(others) <= self.plan.tau_max for given in [self.version, *others])

    @torch.no_grad()
    def _move(self, worker: int) -> Message:
        """C(view − x), by which the worker's x and what is held of it move towards x."""
        payloads, number = [], self.answers[worker]
        for bucket, view in zip(self.state.buckets, self.views[worker], strict=True):
            compressor, buffer = self.plan.back(bucket), bucket.segments.empty()
            difference = bucket.segments.shaped_views(buffer)
            torch._foreach_copy_(difference, view)
            torch._foreach_sub_(difference, [p.detach() for p in bucket.parameters])
            payload = compressor.extract_(buffer, bucket.segments, self.plan.key(compressor, "pull", number, worker))
            self.plan.move_(view, bucket, payload, number, worker)
            payloads.append(payload)
        self.answers[worker] += 1
        return Message(Kind.MOVE, worker, number, self._applied(worker), payloads=payloads)

    @torch.no_grad()
    def _exact(self, worker: int) -> Message:
        self.views[worker] = [[p.detach().clone() for p in bucket.parameters] for bucket in self.state.buckets]
        number, self.answers[worker] = self.answers[worker], self.answers[worker] + 1
        payloads = [p.reshape(-1) for view in self.views[worker] for p in view]
        return Message(Kind.EXACT, worker, number, self._applied(worker), payloads=[p.clone() for p in payloads])

    def _applied(self, worker: int) -> list[float]:
        return [float(self.applied.pop(worker))] if worker in self.applied else []

    # -- gradients come ----------------------------------------------------------------------------------------------------------

    def _decoded(self, push: Message) -> list[torch.Tensor | None]:
        """By bucket what was pushed, flat; None where nothing was."""
        gradients: list[torch.Tensor | None] = []
        for bucket, payload in zip(self.state.buckets, push.payloads, strict=True):
            if not payload.numel():
                gradients.append(None)
                continue
            compressor, out = self.plan.up(bucket, push.number), bucket.segments.empty()
            payload = payload.to(out.device)
            size = compressor.payload_size(bucket.segments)
            if size is not None and payload.numel() != size:
                raise TransportError(
                    f"asynchronous training: a payload of worker {push.worker} for '{bucket.segments.names[0]}', … has {payload.numel()} elements, "
                    f"and {compressor} makes {size}: it was damaged on its way, or that rank has other settings."
                )
            key = self.plan.key(compressor, "push", push.number, push.worker)
            decode_sum_(out, compressor, bucket.segments, [(payload, key)])
            if not compressor.finite(payload, bucket.segments):
                raise TransportError(f"asynchronous training: worker {push.worker} pushed an inf or NaN, which workers refuse.")
            gradients.append(out)
        return gradients

    def _with_last(self, worker: int, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """By bucket the sum of this gradient and of the last ones of the other workers, in their order. One that brings nothing of a bucket moves
        nothing there."""
        last = self.last.setdefault(worker, [bucket.segments.zeros() for bucket in self.state.buckets])
        total: list[torch.Tensor | None] = []
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                last[i].copy_(gradient)
                gradient.zero_()
                for other in sorted(self.last):
                    gradient.add_(self.last[other][i])
            total.append(gradient)
        return total

    def _step(self, push: Message, gradients: list[torch.Tensor | None]) -> None:
        """A step of the optimizer with the worker's hyper-parameters. A parameter without a gradient on the worker, of whose residual nothing came
        either, has none here: it stays as it is, as the optimizer's state does."""
        self._hyper_parameters.adopt(push.numbers)
        whole = [group.get("lr") for group in self.optimizer.param_groups]
        share = self.plan.share_of(len(self.living))
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
            if share != 1.0:
                group["lr"] = group["lr"] * share
        for bucket, gradient in zip(self.state.buckets, gradients, strict=True):
            if gradient is None:
                continue
            for name, p, g in zip(bucket.segments.names, bucket.parameters, bucket.segments.shaped_views(gradient), strict=True):
                if self._places[name] not in push.absent or bool(g.any()):
                    p.grad = g.to(p.dtype)
        with torch.enable_grad():
            self.optimizer.step()
        if share != 1.0:
            for group, lr in zip(self.optimizer.param_groups, whole, strict=True):
                group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)

    # -- saving ------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What goes on after a checkpoint, beside x and the optimizer's own state: plain numbers, and gradients that are used again; of the workers
        that live, numbered anew in their order. Taken when all of these hold x exactly, or none anything, so what they hold need not be saved."""
        living = self.living
        counters: dict[str, Any] = {"version": self.version, "pushes": [self.pushes[w] for w in living], "answers": [self.answers[w] for w in living]}
        if self.plan.reuse:
            counters["last"] = {str(living.index(w)): [t.clone() for t in last] for w, last in self.last.items() if w in living}
        return counters

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, with the workers that live; counters of another number of them begin anew. Workers begin by
        pulling."""
        self.version, living = saved["version"], self.living
        same = len(saved["pushes"]) == len(living)
        self.pushes, self.answers = [0] * self.plan.workers, [0] * self.plan.workers
        for place, worker in enumerate(living if same else []):
            self.pushes[worker], self.answers[worker] = saved["pushes"][place], saved["answers"][place]
        self.last = {living[int(w)]: [t.clone() for t in last] for w, last in saved.get("last", {}).items()} if same else {}
        self.views.clear()
        self.in_flight.clear()
        self.applied.clear()
        self.waiting.clear()
