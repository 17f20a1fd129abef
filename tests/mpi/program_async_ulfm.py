"""Asynchronous workers that die, and the others go on: `servers`, a folder, and deaths. Each of these, RANK:TURN:MOMENT, names a worker, the turn
of its loop in which it kills itself, and when: in `forward`; as the head of a `push` has left for the last server, or while it waits for that one's
answer (`pull`); in `consistent`, `save` or `load`, the second of its files written or read; or after `finish` (`end`). A server may die, too."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

import mpi_backend as hvd
from hvd_ecsgd import Compression
from hvd_ecsgd.asynchronous import Kind
from hvd_ecsgd.checkpoint import parts
from hvd_ecsgd.compressors import Sign, TopK
from mpi_backend.asynchronous.post import Post

TURNS = 40
servers, folder = int(sys.argv[1]), Path(sys.argv[2])
deaths = [(int(rank), int(turn), moment) for rank, turn, moment in (text.split(":") for text in sys.argv[3:])]
everyone = MPI.COMM_WORLD.Get_size()
me, workers = MPI.COMM_WORLD.Get_rank(), everyone - servers
mine = {moment: turn for rank, turn, moment in deaths if rank == me}
turn = -1


def die() -> None:
    (folder / f"when{me}").write_text(f"{time.time()}")
    os.kill(os.getpid(), signal.SIGKILL)


def due(moment: str) -> bool:
    return mine.get(moment) == turn


def before(target: Any, function: str, when: Callable[..., bool]) -> None:
    """Die in place of a call."""
    original = getattr(target, function)

    def called(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            die()
        return original(*args, **kwargs)

    setattr(target, function, called)


def plant() -> None:
    send = Post.send

    def sent(self: Post, message: Any, to: int) -> None:
        if due("push") and message.kind is Kind.PUSH and to == everyone - 1:
            self.comm.Send(bytearray(message.head()), to, 1)
            die()
        if due("save") and message.kind is Kind.SAVE:
            before(parts, "_sync", lambda path: True)
        send(self, message, to)

    Post.send = sent  # type: ignore[method-assign]
    before(Post, "wait_for", lambda self, source: due("pull") and source == everyone - 1)
    before(parts.Parts, "verify", lambda self, r: due("load"))


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number * 100 + me))
    return x, (x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(5))).argmax(1)


def the_same(model: torch.nn.Module, size: int) -> None:
    """Among those that live, of which there are so many; called again where one has died meanwhile."""
    own = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).unsqueeze(0)
    while True:
        try:
            rows = hvd.allgather(own, name="x")
            break
        except hvd.RankLostError:
            continue
    assert rows.shape[0] == hvd.size() == size and torch.isfinite(rows).all(), (rows.shape, hvd.size(), size)
    assert all(torch.equal(rows[0], row) for row in rows), "x is the same on all that live"


def left(moments: tuple[str, ...], until: int) -> int:
    """Workers that live after so many turns, and these moments of that turn."""
    return workers - sum(rank < workers and (at < until or (at == until and moment in moments)) for rank, at, moment in deaths)


hvd.init()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
if any(rank >= workers for rank, *_ in deaths) and hvd.is_serving():
    from hvd_ecsgd.asynchronous import Server

    victim = next(rank for rank, *_ in deaths)
    before(Server, "on_push", lambda self, push: me == victim and self.version > 30)
sgd = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
compression = Compression.double_squeeze(Sign(), TopK(4), dense_below=16)
optimizer = hvd.AsyncDistributedOptimizer(sgd, model.named_parameters(), compression, tau_max=workers)
plant()
STEP = ("forward", "push", "pull")
for turn in range(TURNS):
    optimizer.zero_grad()
    inputs, labels = batch(turn)
    if due("forward"):
        die()
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    if turn % 20 == 9:
        with optimizer.consistent():
            if due("consistent"):
                die()
            the_same(model, left((*STEP, "consistent"), turn))
    if turn % 20 == 14:
        optimizer.save(folder / "saved", model, extras={"turn": turn, "rank": hvd.rank()})
    if turn % 20 == 19 and turn > 20:
        restored = optimizer.load(folder / "saved", model)
        assert restored.extras["turn"] == turn - 5
optimizer.finish()
the_same(model, left((), TURNS))
accuracy = float((model(batch(1)[0]).argmax(1) == batch(1)[1]).float().mean())
assert accuracy > 0.6, accuracy
if hvd.rank() == 0:
    print(f"well: {hvd.size()} of {workers} workers came to the end, accuracy {accuracy:.2f}", flush=True)
turn = TURNS
if due("end"):
    die()
hvd.shutdown()
