"""A checkpoint of n workers on m workers: what is not applied yet is kept."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_ecsgd import Compression, load_checkpoint, save_checkpoint
from hvd_ecsgd.checkpoint.resize import Leaf, merge, recut, shares
from hvd_ecsgd.compressors import RandomBlock
from hvd_ecsgd.exchange import Every, SkipAllReduce
from hvd_ecsgd.feedback import DistEFSGD
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL, Case, by_name, ids, rows_that_cover
from tests.problems import flat, same_bits, weights
from tests.unit.test_state import Setup, equal

FEW, MORE = [(3, 2), (2, 4)], [(2, 3), (4, 2), (1, 3), (3, 1)]


def test_shares_are_the_slices_of_one_cake() -> None:
    """Every new worker gets a whole share, and of every old worker's share nothing is lost or given twice."""
    for n in range(1, 8):
        for m in range(1, 8):
            given = {i: Fraction(0) for i in range(n)}
            for j in range(m):
                mine = shares(j, m, n)
                total = sum(mine.values())
                for i, count in mine.items():
                    given[i] += Fraction(count, total * m)
                if m % n == 0:
                    assert len(mine) == 1
            assert all(g == Fraction(1, n) for g in given.values()), (n, m)


def test_recutting_rounds_once() -> None:
    """Half a unit in the last place of each element, and equal values stay themselves."""
    generator = torch.Generator().manual_seed(3)
    old = [torch.randn(1000, generator=generator) for _ in range(3)]
    for j in range(2):
        mine = shares(j, 2, 3)
        new = recut([old[i] for i in mine], list(mine.values()))
        exact = sum(old[i].double() * w for i, w in mine.items()) / sum(mine.values())
        assert np.all(np.abs(new.numpy() - exact.numpy()) <= np.spacing(np.abs(new.numpy())) / 2 * (1 + 1e-6))  # type: ignore[union-attr]
    assert torch.equal(recut([old[0]] * 3, [1, 2, 4]), old[0])


def test_merging_averages_floating_point_numbers_and_copies_all_else() -> None:
    """By the weights, also inside lists; of counters, of tensors of other shapes, and of what is no tensor, the first worker's."""

    def tree(x: list[float], count: int, size: int) -> dict[str, Any]:
        tensors = {"x": torch.tensor(x), "count": torch.tensor(count), "size": torch.zeros(size)}
        leaves = {name: Leaf(repr(t), lambda t=t: t) for name, t in tensors.items()}  # type: ignore[misc]
        return {"list": [leaves["x"], count], **leaves}

    merged = merge([tree([1.0, 4.0], 2, 3), tree([5.0, 4.0], 10, 4)], [1, 3])
    assert merged["x"].tolist() == merged["list"][0].tolist() == [4.0, 4.0]
    assert merged["count"].item() == merged["list"][1] == 2
    assert merged["size"].numel() == 3
    assert merge([tree([1.0], 2, 3)] * 2, [1, 3])["x"].tolist() == [1.0], "control: what is equal"


def whole(states: list[dict[str, Any]], slot: str) -> dict[str, torch.Tensor]:
    """Mean over workers of a slot by parameter, in float64; of servers' slots, the pieces one after the other."""
    names = states[0]["parameters"]
    if slot == "server_residual":
        return {n: torch.cat([s["parameters"][n][slot].double().flatten() for s in states]) for n in names if slot in names[n]}
    return {n: torch.stack([s["parameters"][n][slot].double() for s in states]).mean(0) for n in names if slot in names[n]}


def trained(case: Case, n: int, folder: Path, steps: int = 4) -> list[Any]:
    def worker(transport: Transport) -> Any:
        setup = Setup(case, transport)
        setup.train(0, steps)
        save_checkpoint(folder, setup.model, setup.optimizer, setup.compression, extras={"rank": transport.rank})
        return setup.save()

    return run_simulated(n, worker)


def resized(case: Case, m: int, folder: Path, after: Callable[[Setup, Any], Any]) -> list[Any]:
    def worker(transport: Transport) -> Any:
        setup = Setup(case, transport)
        return after(setup, load_checkpoint(folder, setup.model, setup.optimizer, setup.compression))

    return run_simulated(m, worker)


@pytest.mark.parametrize(("n", "m"), FEW)
@pytest.mark.parametrize("case", rows_that_cover(), ids=ids)
def test_what_is_not_applied_yet_is_kept(case: Case, n: int, m: int, tmp_path: Path) -> None:
    """Means of residuals and momentum over workers, and the servers' residuals; x and the optimizer bit for bit; training goes on in step."""
    before = trained(case, n, tmp_path)

    def after(setup: Setup, loaded: Any) -> Any:
        state = setup.save()
        setup.train(4, 6)
        return state, loaded, weights(setup.model, setup.compression)

    results = resized(case, m, tmp_path, after)
    states = [s["compression"] for s, *_ in results]
    for slot in ("residual", "momentum", "x", "server_residual"):
        old, new = whole([s["compression"] for s in before], slot), whole(states, slot)
        assert old.keys() == new.keys()
        for name in old:
            if m % n == 0 or slot == "server_residual":
                assert torch.allclose(old[name], new[name], rtol=1e-15, atol=0), (slot, name)
            else:
                limit = 2.0**-24 * max(s["compression"]["parameters"][name][slot].abs().max().item() for s in before)
                assert (old[name] - new[name]).abs().max() <= limit, (slot, name)
    for state, loaded, _ in results:
        assert equal(state["model"], before[0]["model"])
        assert equal(state["optimizer"], before[0]["optimizer"])
        assert (loaded.saved_size, loaded.size, loaded.step) == (n, m, 4)
        assert state["compression"]["step"] == 4
    assert same_bits(w for *_, w in results)
    assert not torch.equal(results[0][2], flat(before[0]["model"].values()))


@pytest.mark.parametrize(("n", "m"), MORE)
@pytest.mark.parametrize("name", ["double_squeeze-everything", "detached"])
def test_what_is_not_applied_yet_is_kept_whatever_the_numbers_of_workers(name: str, n: int, m: int, tmp_path: Path) -> None:
    test_what_is_not_applied_yet_is_kept(by_name(name), n, m, tmp_path)


def test_the_naive_ways_lose_something(tmp_path: Path) -> None:
    """Control: every worker keeping its own residual, or starting without, changes the mean by far more than rounding."""
    case = by_name("top_k")
    before = trained(case, 3, tmp_path)
    states = [s["compression"] for s in before]
    mean = whole(states, "residual")["0.weight"]
    assert (whole(states[:2], "residual")["0.weight"] - mean).abs().max() > 1e-3
    assert mean.abs().max() > 1e-3
    kept = resized(case, 2, tmp_path, lambda setup, loaded: setup.compression.state_dict())
    assert (whole(kept, "residual")["0.weight"] - mean).abs().max() < 1e-7


ALIKE = {
    "q": Case("power_sgd", lambda: Compression.power_sgd(4, **ALL)),
    "skips": Case("skipped", lambda: Compression(RandomBlock(8), DistEFSGD(), SkipAllReduce(Every(9, offset=8)), **ALL)),
}


@pytest.mark.parametrize("m", [1, 3, 4])
@pytest.mark.parametrize("slot", ALIKE)
def test_what_an_exchange_holds_alike_everywhere_is_copied(slot: str, m: int, tmp_path: Path) -> None:
    """PowerSGD's Q, from which it iterates, and the count of steps that all skipped. A count for each worker (control) starts again."""

    def states(case: Case, folder: Path) -> tuple[Any, list[Any]]:
        before = trained(case, 2, folder)[0]["compression"]["parameters"]
        return before, resized(case, m, folder, lambda setup, loaded: setup.compression.state_dict()["parameters"])

    before, after = states(ALIKE[slot], tmp_path / "alike")
    assert any(entry[slot].any() for entry in before.values())
    assert all(torch.equal(state[name][slot], before[name][slot]) for state in after for name in before)
    before, after = states(Case("each", lambda: Compression.comp_skip(Every(9, offset=8), **ALL)), tmp_path / "each")
    assert any(entry["skips"].any() for entry in before.values())
    assert not any(entry["skips"].any() for state in after for entry in state.values())


def test_it_says_what_it_did(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(by_name("comp_skip-norm"), 3, tmp_path)
    loaded = resized(by_name("comp_skip-norm"), 2, tmp_path, lambda setup, loaded: loaded)
    assert set(loaded[0].notes) == {
        "cut anew: momentum, residual",
        "put together and cut in new pieces: server_residual",
        "started again: movement, skips",
    }
    assert [r.message for r in caplog.records] == [
        f"{tmp_path} was saved by 3 workers, and there are 2 now; the state was {'; '.join(loaded[0].notes)}."
    ]
    assert [item.extras["rank"] for item in loaded] == [0, 1]


def test_it_says_that_a_start_is_copied(tmp_path: Path) -> None:
    """PowerSGD's Q has not the parameter's shape, and is the same on all workers all the same."""
    trained(by_name("power_sgd-own-everything"), 3, tmp_path)
    loaded = resized(by_name("power_sgd-own-everything"), 2, tmp_path, lambda setup, loaded: loaded)
    assert all(set(item.notes) == {"cut anew: residual", "copied: q"} for item in loaded)


def test_there_and_back(tmp_path: Path) -> None:
    """2 → 4 → 2 workers gives the state back bit for bit: copies, and means of equal numbers."""
    case = by_name("double_squeeze-everything")
    before = trained(case, 2, tmp_path / "a")

    def again(setup: Setup, loaded: Any) -> None:
        save_checkpoint(tmp_path / "b", setup.model, setup.optimizer, setup.compression)

    resized(case, 4, tmp_path / "a", again)
    back = resized(case, 2, tmp_path / "b", lambda setup, loaded: setup.save())
    assert all(equal(a["compression"], b["compression"]) for a, b in zip(before, back))
