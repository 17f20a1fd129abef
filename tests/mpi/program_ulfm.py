"""Ranks that die, and the others go on: each argument, RANK:STEP:METHOD:MOMENT, names a rank of those there were at first, the step and the optimizer
in which it kills itself, and when: in `forward`, as it sends its part of `reduce`, `gather`, `push` (pass 1) or `pull` (pass 2), to the second
of its peers if there are two, as it sends in a collective of its own (`named`), or as all shut down (`end`). Those that are left compare what they
have trained with simulated workers that begin with the survivors' state after the last step that was finished before."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

import mpi_backend as hvd
from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.compressors import TopK
from hvd_ecsgd.optimizer import driver_of
from hvd_ecsgd.transport import run_simulated
from mpi_backend.transport.messages import Messages
from tests.mpi.verdict import Verdict

STEPS = 6
ALL = {"dense_below": 0, "dense_1d": False}
METHODS: dict[str, Callable[[], Any]] = {
    "none": lambda: Compression.none,
    "summed": lambda: Compression.fp16(**ALL),
    "random_block": lambda: Compression.random_block(ratio=4, **ALL),
    "top_k": lambda: Compression.top_k(ratio=8, **ALL),
    "qsgd": lambda: Compression.qsgd(**ALL),
    "double_squeeze": lambda: Compression.double_squeeze(**ALL),
    "central": lambda: Compression.double_squeeze(TopK(ratio=4), central=True, **ALL),
    "local_momentum": lambda: Compression.local_momentum(**ALL),
    "power_sgd": lambda: Compression.power_sgd(approximation_rank=1, **ALL),
}


@dataclass(frozen=True)
class Death:
    rank: int
    step: int
    method: str
    moment: str

    @staticmethod
    def of(text: str) -> Death:
        rank, step, method, moment = text.split(":")
        return Death(int(rank), int(step), method, moment)


def model_of(method: str) -> torch.nn.Module:
    torch.manual_seed(1 + list(METHODS).index(method))
    return torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU(), torch.nn.Linear(20, 10))


def options_of(method: str) -> dict[str, Any]:
    return {"lr": 0.1, "momentum": 0.9}


def backward(model: torch.nn.Module, worker: int, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 * worker + step)
    x, y = torch.randn(8, 30, generator=generator), torch.randint(0, 10, (8,), generator=generator)
    torch.nn.functional.cross_entropy(model(x), y).backward()


def snapshot(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """What a step has left: weights, the optimizer's momentum, and what the method keeps."""
    inner = copy.deepcopy(optimizer.state_dict())
    return {
        "model": {k: v.clone() for k, v in model.state_dict().items()},
        "momentum": [inner["state"].get(i, {}).get("momentum_buffer") for i in range(len(inner["param_groups"][0]["params"]))],
        "compression": optimizer.compression.state_dict(),
    }


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_sending(transport: Any, pass_: str) -> None:
    """In the collective of this name, at the second message, or at the first if that is the last."""
    send, armed = Messages.send, []

    def dying(self: Messages, t: torch.Tensor, peer: int, tag: int) -> MPI.Request:
        if armed and self is transport.link.messages:
            armed.append(tag)
            if len(armed) > min(2, self.size - 1):
                die()
        return send(self, t, peer, tag)

    Messages.send = dying  # type: ignore[method-assign]

    def arming(original: Callable[..., Any]) -> Callable[..., Any]:
        def starting(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(a, str) and a.endswith(f".{pass_}") for a in args):
                armed.append(None)
            return original(*args, **kwargs)

        return starting

    for function in ("allreduce_", "allgather", "alltoall"):
        setattr(transport, function, arming(getattr(transport, function)))


def recut(parts: list[torch.Tensor | None], numel: int, size: int, rank: int) -> torch.Tensor:
    """The new server's piece, of old servers' pieces, which are nothing of a dead one. Pieces are of whole bytes when packed to bits."""
    whole, n = torch.zeros(numel), len(parts)
    length = -(-numel // (8 * n)) * 8 if n > 1 else numel
    for r, part in enumerate(parts):
        if part is not None and part.numel():
            whole[r * length : r * length + part.numel()] = part
    length = -(-numel // (8 * size)) * 8 if size > 1 else numel
    return whole[rank * length : (rank + 1) * length].clone()


def begun_by(survivors: list[int], before: list[int], saved: dict[int, dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """What the method keeps on each of the survivors as workers of a job of their own."""
    states = []
    for rank, worker in enumerate(survivors):
        state = {**saved[worker]["compression"], "rank": rank, "size": len(survivors)}
        state["parameters"] = {name: dict(entry) for name, entry in state["parameters"].items()}
        for name, entry in state["parameters"].items():
            if "server_residual" not in entry:
                continue
            theirs = [saved[w]["compression"]["parameters"][name]["server_residual"] if w in survivors else None for w in before]
            numel = saved[worker]["model"][name].numel()
            if method == "central":  # the first rank has all
                whole = theirs[0] if theirs[0] is not None else torch.zeros(numel)
                entry["server_residual"] = whole if rank == 0 else torch.zeros(0)
            else:
                entry["server_residual"] = recut(theirs, numel, len(survivors), rank)
        states.append(state)
    return states


def control(method: str, survivors: list[int], before: list[int], saved: dict[int, dict[str, Any]], steps: range) -> list[dict[str, Any]]:
    """The survivors alone, beginning with what they had."""
    states = begun_by(survivors, before, saved, method)

    def worker(transport: Any) -> dict[str, Any]:
        mine = saved[survivors[transport.rank]]
        model = model_of(method)
        model.load_state_dict(mine["model"])
        sgd = torch.optim.SGD(model.parameters(), **options_of(method))
        optimizer = DistributedOptimizer(
            sgd, model.named_parameters(), METHODS[method](), transport=transport, sum_gradients=method == "summed", overlap=False
        )
        optimizer.compression.load_state_dict(states[transport.rank])
        for p, momentum in zip(model.parameters(), mine["momentum"], strict=True):
            if momentum is not None:
                optimizer.state[p]["momentum_buffer"] = momentum.clone()
        for step in steps:
            optimizer.zero_grad()
            backward(model, survivors[transport.rank], step)
            optimizer.step()
        return snapshot(model, optimizer)

    return run_simulated(len(survivors), worker)


def main() -> None:
    deaths = [Death.of(text) for text in sys.argv[2:]]
    hvd.init()
    me, verdict = hvd.rank(), Verdict()
    methods = sys.argv[1].split(",")
    models = {method: model_of(method) for method in methods}
    optimizers: dict[str, Any] = {}
    for method, model in models.items():
        op = hvd.Sum if method == "summed" else hvd.Average
        sgd = torch.optim.SGD(model.parameters(), **options_of(method))
        optimizers[method] = hvd.DistributedOptimizer(sgd, model.named_parameters(), METHODS[method](), op=op)
    saved = {method: [snapshot(models[method], optimizers[method])] for method in methods}
    sizes: dict[str, list[int]] = {method: [hvd.size()] for method in methods}
    answers: list[tuple[int, int, float | str]] = []
    members = former = list(range(hvd.size()))
    for step in range(STEPS):
        due = [death for death in deaths if (death.rank, death.step) == (me, step)]
        for method in methods:
            optimizers[method].zero_grad()
            for death in due:
                if death.method == method and death.moment == "forward":
                    die()
                elif death.method == method and death.moment != "named":
                    die_sending(driver_of(optimizers[method]).step.transport, death.moment)
            backward(models[method], me, step)
        for method in methods:
            optimizers[method].step()
            saved[method].append(snapshot(models[method], optimizers[method]))
            sizes[method].append(hvd.size())
        if any(death.moment == "named" for death in due):
            Messages.send = lambda *_: die()  # type: ignore[assignment, method-assign]
            hvd.allreduce(torch.ones(3), op=hvd.Sum, name="mean")
        for _ in range(2):
            try:
                answers.append((step, hvd.size(), float(hvd.allreduce(torch.ones(3), op=hvd.Sum, name="mean")[0])))
                break
            except hvd.RankLostError as error:
                answers.append((step, hvd.size(), str(error)))
        before = members
        if hvd.size() < len(members) or step == STEPS - 1:
            left = hvd.allgather_object((me, saved, sizes))
            members = [rank for rank, *_ in left]
            if hvd.rank() == 0:
                check(verdict, methods, before if len(before) > len(members) else former, {rank: (theirs, numbers) for rank, theirs, numbers in left})
            verdict.failures = hvd.broadcast_object(verdict.failures)  # the next one to die may be the one that has looked
            former = before
    said = hvd.allgather_object(answers)
    if hvd.rank() == 0:
        in_training = [death for death in deaths if death.moment != "end"]
        verdict.expect(len(members) == MPI.COMM_WORLD.Get_size() - len(in_training), f"ranks {members} are left")
        verdict.expect(all(theirs == said[0] for theirs in said), f"named collectives came to {said}")
        errors = [answer for *_, answer in said[0] if isinstance(answer, str)]
        verdict.expect(len(errors) == sum(death.moment == "named" for death in deaths), f"errors of named collectives: {errors}")
        verdict.expect(all(answer == size for _, size, answer in said[0] if not isinstance(answer, str)), f"they sum up those that live: {said[0]}")
        for failure in verdict.failures[:10]:
            print(failure, file=sys.stderr, flush=True)
    if hvd.broadcast_object(verdict.failures):
        sys.exit(1)
    if hvd.rank() == 0:
        print(f"ok {verdict.count}: {', '.join(sys.argv[2:])}", flush=True)
    if any((death.rank, death.moment) == (me, "end") for death in deaths):
        die()


def check(verdict: Verdict, methods: list[str], before: list[int], left: dict[int, tuple[dict[str, Any], dict[str, list[int]]]]) -> None:
    """Of those that are left, by the rank that they had at first, beside those that were there before the last death."""
    survivors = sorted(left)
    for method in methods:
        numbers = left[survivors[0]][1][method]
        verdict.expect(all(theirs[1][method] == numbers for theirs in left.values()), f"{method}: ranks have counted different ranks")
        for step in range(len(numbers)):
            held = [theirs[0][method][step]["model"] for theirs in left.values()]
            for name in held[0]:
                for rank, other in zip(survivors, held, strict=True):
                    verdict.equal(other[name], held[0][name], f"{method}: {name} after {step} steps on rank {rank} beside rank {survivors[0]}")
        if numbers[-1] > len(left):
            continue  # this one's step was over
        first, done = numbers.index(len(left)), len(numbers) - 1
        results = control(method, survivors, before, {r: theirs[0][method][first - 1] for r, theirs in left.items()}, range(first - 1, done))
        for rank, expected in zip(survivors, results, strict=True):
            mine, where = left[rank][0][method][-1], f"on rank {rank} beside survivors alone, steps {first - 1} to {done - 1}"
            for name, t in expected["model"].items():
                verdict.equal(mine["model"][name], t, f"{method}: {name} {where}")
            for name, entry in expected["compression"]["parameters"].items():
                for slot, t in entry.items():
                    if isinstance(t, torch.Tensor):
                        verdict.equal(mine["compression"]["parameters"][name][slot], t, f"{method}: {slot} of {name} {where}")
            verdict.expect(mine["compression"]["step"] == done, f"{method}: rank {rank} has counted {mine['compression']['step']} steps, not {done}")


main()
