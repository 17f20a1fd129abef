"""What a step allocates once all is warm, beside what transports do: nothing of gradient size, of most methods."""

from __future__ import annotations

import copy
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvd_ecsgd import GradientExchange
from hvd_ecsgd.kernels.native import native_library
from hvd_ecsgd.segments import Segments
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import CASES, Case, by_name, ids

pytestmark = pytest.mark.skipif(native_library() is None, reason="torch's own passes, which the reference kernels are, make new tensors")

SIDE = 128
OF_GRADIENT_SIZE = SIDE * SIDE * 4 // 2
"""Bytes; a half, since a payload of 16 bit may be one too many."""


class Watch(TorchDispatchMode):
    """Operations that return new memory of gradient size, with the line of the library that called them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = operation(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.nbytes >= OF_GRADIENT_SIZE and t.untyped_storage().data_ptr() not in given:
                callers = [f for f in traceback.extract_stack() if "/hvd_ecsgd/" in f.filename]
                if "/transport/" not in callers[-1].filename:
                    place = callers[-1].filename.split("/hvd_ecsgd/")[1]
                    self.seen.append(f"{operation} of {t.nbytes} bytes, {place}:{callers[-1].lineno}")
        return result


def random(rank: int) -> torch.Tensor:
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(rank))


def allocated(case: Case, gradient_of: Callable[[int], torch.Tensor] = random) -> list[str]:
    """By worker 0 of two, in its fifth step."""

    def worker(transport: Transport) -> list[str]:
        model, method = torch.nn.Linear(SIDE, SIDE, bias=False), case.make()
        options = {"lr": 0.1} if method.method.feedback.takes.learning_rate else {}
        exchange = GradientExchange(model.named_parameters(), method, transport, **options)
        gradient = {"weight": gradient_of(transport.rank)}
        for _ in range(4):
            exchange.reduce(gradient)
        if transport.rank:
            exchange.reduce(gradient)
            return []
        with Watch() as watch:
            exchange.reduce(gradient)
        return watch.seen

    return run_simulated(2, worker)[0]


ALLOCATE = {
    "bf16": "payloads for several servers are made one by one and joined",
    "hessian_aided": "curvature is estimated in torch's own passes",
    "butterfly": "all meet in some steps only",
    "cser": "errors are reset in some steps only",
}
"""Rows that do, and why."""


@pytest.mark.parametrize("case", [c for c in CASES if "matrix" not in c.name and not c.name.startswith(tuple(ALLOCATE))], ids=ids)
def test_nothing_of_gradient_size(case: Case) -> None:
    assert allocated(case) == []


def test_nothing_of_gradient_size_where_a_threshold_lets_all_pass() -> None:
    assert allocated(by_name("threshold"), lambda rank: torch.full((SIDE, SIDE), 0.5 + rank)) == []


@pytest.mark.parametrize("name", ["none", "fp16", "fp16-feedback", "local_momentum-dense"])
def test_what_is_made_in_every_step_is_used_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: it is made anew."""
    monkeypatch.setattr(
        Segments, "scratch", lambda self, dtype=None, n=None: torch.empty(n or self.numel, dtype=dtype or self.dtype, device=self.device)
    )
    assert allocated(by_name(name))


def test_scratch_memory_that_somebody_refers_to_is_left_alone() -> None:
    segments = Segments.of([("w", torch.zeros(4, 4))], {"w": 0}, 16)
    first = segments.scratch().fill_(1.0)
    view, address = first[3:5], first.data_ptr()
    del first
    second = segments.scratch().fill_(2.0)
    assert view.tolist() == [1.0, 1.0] and second.data_ptr() != address
    del view
    assert segments.scratch().data_ptr() == address
    assert segments.scratch(torch.float16).dtype == torch.float16 and second.eq(2.0).all()


def test_payloads_of_ever_other_sizes_keep_no_memory() -> None:
    """What compresses more from step to step leaves a few sizes behind, and no more; of one size the same memory comes again (control)."""
    segments = Segments.of([("w", torch.zeros(4, 4))])
    addresses = {segments.payload(24).data_ptr() for _ in range(5)}
    assert len(addresses) == 1
    for n_bytes in range(8, 8 * 50, 8):
        assert segments.payload(n_bytes).eq(0).all()
    assert len(segments._scratch) <= 5  # type: ignore[attr-defined]


def test_copies_of_segments_keep_no_memory_of_theirs() -> None:
    """Two that know the same memory would both hand it out, and free the weak reference to it twice."""
    segments = Segments.of([("w", torch.zeros(4, 4))])
    first = segments.scratch().fill_(1.0)
    copies = [copy.deepcopy(segments), pickle.loads(pickle.dumps(segments))]
    address = first.data_ptr()
    del first
    again = [s.scratch().fill_(float(i)) for i, s in enumerate([segments, *copies])]
    assert again[0].data_ptr() == address and [float(t[0]) for t in again] == [0.0, 1.0, 2.0]
    assert all(c == segments and "_scratch" not in c.__getstate__() for c in copies)
