"""How ranks of an unmodified Horovod find each other's counterpart before the first step, on simulated ranks with a register each."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_ecsgd import DisagreementError
from hvd_ecsgd.horovod.introduction import Introduction, Register
from hvd_ecsgd.transport import Transport, run_simulated

collecting = threading.Lock()


class Rank:
    """The objects of one rank's program. It holds all that it drops until `collect`."""

    def __init__(self, transport: Transport) -> None:
        self.transport, self.register = transport, Register()
        self.garbage: list[object] = []

    @staticmethod
    def model(width: int = 3) -> torch.nn.Module:
        return torch.nn.Linear(width, 2)

    def bind(self, model: torch.nn.Module) -> Introduction:
        return Introduction(model.named_parameters(), [], None, self.register)

    def meet(self, *introductions: Introduction) -> list[str]:
        return [i.meet(self.transport)[0] for i in introductions]

    def drop(self, *objects: object) -> None:
        self.garbage.extend(objects)

    def collect(self) -> None:
        with collecting:
            self.garbage.clear()
            gc.collect()


def on_ranks(program: Callable[[Rank], object], n: int = 2) -> list[object]:
    return run_simulated(n, lambda transport: program(Rank(transport)))


@settings(max_examples=25, deadline=None)
@given(
    script=st.lists(st.sampled_from(["drop", "drop two", "train", "again", "both", "crossed"]), min_size=1, max_size=6),
    moments=st.lists(st.integers(0, 5), max_size=4),
)
def test_names_are_equal_whenever_a_collector_runs(script: list[str], moments: list[int]) -> None:
    """Rank 1 collects at arbitrary moments, rank 0 never."""

    def program(rank: Rank) -> list[str]:
        odd, said = rank.transport.rank == 1, []
        old = rank.model()
        for moment, what in enumerate(script):
            if what.startswith("drop"):
                for _ in range(1 + what.endswith("two")):
                    model = rank.model()
                    rank.drop(model, rank.bind(model))
                    del model
            elif what in ("train", "again"):
                model = rank.model() if what == "train" else old
                said += rank.meet(rank.bind(model))
                rank.drop(model)
            else:
                a, b = rank.bind(rank.model()), rank.bind(rank.model())
                order = (b, a) if odd and what == "crossed" else (a, b)
                said += sorted(rank.meet(*order))
                rank.drop(a, b)
                del a, b, order
            if odd and moment in moments:
                rank.collect()
        return said

    first, second = on_ranks(program)
    assert first == second
    assert isinstance(first, list) and len(set(first)) == len(first), "no name is given twice"


def test_two_models_in_one_pass_find_their_own_counterpart() -> None:
    def program(rank: Rank) -> dict[str, tuple[str, bool]]:
        models = {name: rank.bind(rank.model()) for name in "abc"}
        order = ("abc", "bca", "cba")[rank.transport.rank]
        return {name: models[name].meet(rank.transport) for name in order}

    said = on_ranks(program, 3)
    names = [{k: v[0] for k, v in s.items()} for s in said]  # type: ignore[attr-defined]
    assert names[0] == names[1] == names[2] and len(set(names[0].values())) == 3
    assert not any(together for s in said for _, together in s.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("when", ["before", "after", "kept before"])
@pytest.mark.parametrize("which", ["the same model", "another model"])
def test_what_one_rank_binds_to_look_at_it_does_not_count(when: str, which: str) -> None:
    """And two models of one pass that ranks come to in one order find each other after that; together, as nobody is elsewhere."""

    def program(rank: Rank) -> list[tuple[str, bool]]:
        models = [rank.model(), rank.model()]
        looks = rank.transport.rank == 1
        kept = []
        if looks and "before" in when:
            kept.append(rank.bind(models[0] if which == "the same model" else rank.model()))
        if when == "before":
            kept.clear()
        bound = [rank.bind(model) for model in models]
        if looks and when == "after":
            kept.append(rank.bind(models[0] if which == "the same model" else rank.model()))
        return [b.meet(rank.transport) for b in bound]

    first, second = on_ranks(program)
    assert first == second and all(together for _, together in first)  # type: ignore[attr-defined]


def test_a_model_of_one_rank_and_two_in_different_orders_cannot_be_told_apart() -> None:
    """An error on every rank at the second meeting, where it can be seen; with the same order (above) there is none."""

    def program(rank: Rank) -> str:
        if rank.transport.rank == 1:
            rank.drop(rank.bind(rank.model()))
        a, b = rank.bind(rank.model()), rank.bind(rank.model())
        first, second = (a, b) if rank.transport.rank else (b, a)
        rank.meet(first)
        with pytest.raises(DisagreementError, match="different orders") as told:
            rank.meet(second)
        return str(told.value)

    first, second = on_ranks(program)
    assert first == second


def test_a_real_difference_is_told_to_every_rank_and_training_can_begin_anew() -> None:
    def program(rank: Rank) -> tuple[str, list[str]]:
        rank.drop(rank.bind(rank.model()))
        with pytest.raises(DisagreementError, match=r"'weight'.*rank 0 has \(2, 3\).*rank 1 has \(2, 4\)") as told:
            rank.meet(rank.bind(rank.model(3 + rank.transport.rank)))
        if rank.transport.rank:
            rank.collect()
        return str(told.value), rank.meet(rank.bind(rank.model()))

    first, second = on_ranks(program)
    assert first == second


def test_another_number_of_optimizers_of_one_model_is_told_to_every_rank() -> None:
    def program(rank: Rank) -> None:
        model, wide = rank.model(), rank.model(5)
        rank.meet(rank.bind(model))
        with pytest.raises(DisagreementError):
            rank.meet(rank.bind(model if rank.transport.rank else wide))

    on_ranks(program)
