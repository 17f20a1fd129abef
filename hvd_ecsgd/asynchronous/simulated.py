"""Workers and servers in one process, on links that keep order and take as long as the caller likes: for tests, and for simulated time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .messages import Kind, Message
from .plan import Plan, shards_of
from .server import Server
from .worker import Worker

__all__ = ["Event", "SimulatedJob"]


@dataclass(frozen=True)
class Event:
    """`compute`: the worker may compute a gradient, and push it. `up`, `down`: the first message on a link may arrive. `die`: the worker does nothing
    more; what it has sent may still arrive. `lost`: a server hears of that, and nothing arrives there any more."""

    what: Literal["compute", "up", "down", "die", "lost"]
    worker: int
    server: int = 0


class SimulatedJob:
    """`make` returns a model and its optimizer, alike each time. Whoever uses this chooses which of the `possible` events happens next."""

    def __init__(self, plan: Plan, make: Callable[[], tuple[torch.nn.Module, torch.optim.Optimizer]], servers: int = 1) -> None:
        self.plan = plan
        self.models: list[torch.nn.Module] = []
        """By worker."""
        self.masters: list[torch.nn.Module] = []
        """By server; of each only the parameters that it serves are x."""
        self.workers: list[Worker] = []
        self.servers: list[Server] = []
        for s in range(servers):
            model, optimizer = make()
            self.masters.append(model)
            self.servers.append(Server(plan, shards_of(_trained(model), servers)[s], optimizer))
        for w in range(plan.workers):
            model, optimizer = make()
            self.models.append(model)
            self.workers.append(Worker(plan, shards_of(_trained(model), servers), optimizer, w))
        self.up = {(w, s): deque[Message]() for w in range(plan.workers) for s in range(servers)}
        self.down = {(w, s): deque[Message]() for w in range(plan.workers) for s in range(servers)}
        self.computing: set[int] = set()
        """Workers that hold x of every server."""
        self.dead: set[tuple[int, int]] = set()
        """Workers that have died, with the servers that have not heard of it."""
        for w in range(plan.workers):
            self._pull(w, 0)

    def possible(self) -> list[Event]:
        """What may happen next, but for deaths, which may at any time. Never nothing, while a worker lives."""
        events = [Event("compute", w) for w in sorted(self.computing)]
        events += [Event("lost", w, s) for w, s in sorted(self.dead)]
        events += [Event("up", w, s) for (w, s), link in self.up.items() if link]
        return events + [Event("down", w, s) for (w, s), link in self.down.items() if link]

    def happen(self, event: Event, backward: Callable[[int, torch.nn.Module], None]) -> None:
        """`backward` gives the worker's model gradients, where it computes."""
        w, s = event.worker, event.server
        if event.what == "compute":
            self.computing.remove(w)
            self.models[w].zero_grad()
            backward(w, self.models[w])
            messages = self.workers[w].push()
            for t in range(len(self.servers)):
                self.up[w, t].append(Message(Kind.LEAVE, w) if messages is None else messages[t])
            self._pull(w, 0)
        elif event.what == "die":
            self.computing.discard(w)
            for t in range(len(self.servers)):
                self.dead.add((w, t))
                self.down[w, t].clear()
        elif event.what == "lost":
            self.dead.remove((w, s))
            self.up[w, s].clear()
            self._answer(s, self.servers[s].on_lost(w))
        elif event.what == "up":
            self._answer(s, self.servers[s].on(_over_the_wire(self.up[w, s].popleft())))
        else:
            self.workers[w].on_answer(s, _over_the_wire(self.down[w, s].popleft()))
            if s + 1 < len(self.servers):
                self._pull(w, s + 1)
            else:
                self.computing.add(w)

    def _answer(self, s: int, answers: Sequence[Message]) -> None:
        for answer in answers:
            if (answer.worker, s) not in self.dead:
                self.down[answer.worker, s].append(answer)

    def _pull(self, w: int, s: int) -> None:
        self.up[w, s].append(Message(Kind.PULL, w))


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _over_the_wire(message: Message) -> Message:
    received = Message.of_head(message.head(), most=message.nbytes)
    for target, payload in zip(received.payloads, message.payloads, strict=True):
        target.copy_(payload)
    received.check(message.worker)
    return received
