"""Policies of CompSkip: who sends when, and which settings are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer
from hvd_ecsgd.compressors import TopK
from hvd_ecsgd.exchange import Bernoulli, CompSkip, Every, NormBased, Rounds, SkipAllReduce
from hvd_ecsgd.feedback import NoFeedback
from hvd_ecsgd.segments import Key
from tests.recursions import ALL

NAN = float("nan")


def test_every() -> None:
    sends = [[Every(3).sends(Key(0, t, r), NAN, NAN) for t in range(6)] for r in range(3)]
    assert sends == [[(t - r) % 3 == 0 for t in range(6)] for r in range(3)]
    assert Every(2).sends(Key(0, 4, None), NAN, NAN)
    assert [t for t in range(6) if Every(3, offset=1).sends(Key(0, t, 2), NAN, NAN)] == [1, 4]
    assert not Every(2, offset=1).sends(Key(0, 4, 0), NAN, NAN)


def test_rounds() -> None:
    """The last of k steps, whoever asks."""
    for rank in (None, 0, 1, 2):
        assert [t for t in range(9) if Rounds(3).sends(Key(0, t, rank), NAN, NAN)] == [2, 5, 8]
        assert all(Rounds(1).sends(Key(0, t, rank), NAN, NAN) for t in range(4))


def test_bernoulli_is_drawn_from_its_key() -> None:
    """Mean q; independent of rank and seeds; the same for the same key."""
    draws = {
        what: torch.tensor([policy.sends(Key(seed, t, rank, "worker"), NAN, NAN) for t in range(4000)])
        for what, (policy, seed, rank) in {
            "a": (Bernoulli(0.3), 0, 0),
            "again": (Bernoulli(0.3), 0, 0),
            "rank": (Bernoulli(0.3), 0, 1),
            "seed": (Bernoulli(0.3), 1, 0),
            "own seed": (Bernoulli(0.3, seed=1), 0, 0),
        }.items()
    }
    assert torch.equal(draws["a"], draws["again"])
    for what, drawn in draws.items():
        assert abs(drawn.double().mean() - 0.3) < 0.04, what  # 5 sd
        if what not in ("a", "again"):
            assert abs((drawn & draws["a"]).double().mean() - 0.09) < 0.03


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "k 0": (lambda: Every(0), "k must be"),
    "a round of 0": (lambda: Rounds(0), "Rounds: k must be"),
    "a round of 1.5": (lambda: Rounds(1.5), "Rounds: k must be"),  # type: ignore[arg-type]
    "cap of rounds": (lambda: Rounds(2, cap=-1), "Rounds: cap"),
    "offset": (lambda: Every(2, 0.5), "offset"),  # type: ignore[arg-type]
    "q 0": (lambda: Bernoulli(0.0), "q must be"),
    "q 2": (lambda: Bernoulli(2), "q must be"),
    "seed": (lambda: Bernoulli(0.5, "1"), "seed"),  # type: ignore[arg-type]
    "threshold": (lambda: NormBased(-1.0), "threshold"),
    "cap": (lambda: Every(2, cap=-1), "cap"),
    "policy": (lambda: Compression.comp_skip(0.5), "worker must be a policy"),  # type: ignore[arg-type]
    "a class": (lambda: Compression.comp_skip(server=Every), "server must be a policy"),  # type: ignore[arg-type]
    "norm in an all-reduce": (lambda: SkipAllReduce(NormBased()), "one decision"),
    "signs in an all-reduce": (lambda: Compression(TopK(), exchange=SkipAllReduce()), "all-reduce"),
    "momentum": (lambda: Compression.comp_skip(momentum=-1), "momentum"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_settings(what: str) -> None:
    make, message = WRONG[what]
    with pytest.raises(CompressionError, match=message):
        make()


def test_skipping_without_feedback_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    compression = Compression(TopK(), NoFeedback(), CompSkip(), **ALL)
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=0.1), [("p", p)], compression)
    with pytest.raises(CompressionError, match="feedback rule that keeps"):
        p.sum().backward()
    assert optimizer is not None
