"""Steps that are taken again, as a worker was lost: from the same bits, wherever the exchange was broken off. Who is lost is a matter of real ranks
(tests/mpi/test_ulfm.py); here all workers live, so that a step that is taken again must give what it would have given at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import CompressionError, DistributedOptimizer
from hvd_ecsgd.errors import PeerLostError
from hvd_ecsgd.optimizer import driver_of
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import CASES, Case, by_name, covering, ids
from tests.problems import flat, mlp, train

STEPS, WORKERS = 3, 2
REFUSED = ("comp_skip", "hessian_aided", "cser", "butterfly", "detached", "power_sgd-local_momentum")


class _Broken:
    """A handle of what a lost worker was to send."""

    def done(self) -> bool:
        return True

    def wait(self) -> Any:
        raise PeerLostError("a worker is gone")


class Breaking:
    """A transport on which collective number `broken` fails."""

    def __init__(self, transport: Transport, broken: int) -> None:
        self._transport, self._broken, self._started = transport, broken, 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._transport, name)
        if name not in ("allreduce_", "allgather", "alltoall", "broadcast_"):
            return value

        def start(*args: Any, **kwargs: Any) -> Any:
            handle = value(*args, **kwargs)
            self._started += 1
            return _Broken() if self._started == self._broken else handle

        return start


class Again:
    """A recovery in which nobody is lost: a step that has broken off is taken again, and so is each of `steps`, after its exchange."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps, self.asked, self.taken_again = steps, 0, 0
        self.driver: Any = None

    def finished(self, error: PeerLostError | None) -> bool:
        self.asked += 1
        if error is None and self.asked - 1 - self.taken_again not in self.steps[self.taken_again : self.taken_again + 1]:
            return True
        self.taken_again += 1
        self.driver.take_back()
        self.driver.take_back()  # once more does nothing
        change = self.driver.prepare_fewer(self.driver.step.transport)
        change()
        self.driver.begin_again()
        return False


def trained(case: Case, broken: int = 0, steps: tuple[int, ...] = ()) -> list[tuple[torch.Tensor, Any, int]]:
    """By worker: weights, the method's state, and how many steps were taken again."""

    def worker(transport: Transport) -> tuple[torch.Tensor, Any, int]:
        model, again = mlp(), Again(steps)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=case.momentum)
        there: Any = Breaking(transport, broken)
        recovery = again if broken or steps else None
        optimizer = DistributedOptimizer(sgd, model.named_parameters(), case.make(), transport=there, recovery=recovery)
        again.driver = driver_of(optimizer)
        train(model, optimizer, transport.rank, range(STEPS))
        return flat(model.parameters()), optimizer.compression.state_dict(), again.taken_again

    return run_simulated(WORKERS, worker)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


SURVIVING = [case for case in covering(CASES) if not case.name.startswith(REFUSED)]


@pytest.mark.parametrize("case", SURVIVING, ids=ids)
def test_a_step_that_is_taken_again_gives_what_it_would_have_given(case: Case) -> None:
    expected = trained(case)
    found = trained(case, steps=(0, 1))
    for (w, state, _), (w2, state2, taken_again) in zip(expected, found, strict=True):
        assert taken_again == 2
        assert torch.equal(w, w2) and same(state, state2)


@pytest.mark.parametrize("name", ["random_block", "double_squeeze-everything"])
def test_wherever_the_exchange_was_broken_off(name: str) -> None:
    """From the first collective of the first step on, in which ranks compare their settings, to those of the second step."""
    case = by_name(name)
    expected = trained(case)
    for broken in range(2, 9):  # the first orders the parameters, when the optimizer is made
        for (w, state, _), (w2, state2, taken_again) in zip(expected, trained(case, broken=broken), strict=True):
            assert taken_again == 1, f"collective {broken}"
            assert torch.equal(w, w2) and same(state, state2), f"collective {broken}"


def make(case: Case, recovery: Any) -> Callable[[], object]:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return lambda: DistributedOptimizer(sgd, model.named_parameters(), case.make(), recovery=recovery)


@pytest.mark.parametrize("case", [case for case in covering(CASES) if case.name.startswith(REFUSED)], ids=ids)
def test_methods_that_cannot_go_on_are_refused_when_the_optimizer_is_made(case: Case) -> None:
    with pytest.raises(CompressionError, match="cannot go on without a worker that dies"):
        make(case, Again(()))()
    make(case, None)()
