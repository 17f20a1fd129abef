"""save_checkpoint and load_checkpoint on simulated workers: what is written comes back, and wrong use is an error."""

from __future__ import annotations

import math
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_ecsgd import CheckpointError, Compression, CompressionError, DistributedOptimizer, load_checkpoint, save_checkpoint
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.cases import by_name
from tests.problems import batch, flat, mlp, same_bits, weights
from tests.unit.checkpoints import CASE, N, load, part, save, trained
from tests.unit.test_state import Setup, equal


@pytest.mark.parametrize("name", ["double_squeeze-everything", "detached", "comp_skip-norm", "random_block", "none"])
def test_a_loaded_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Also with the schedule among the extras, and into objects that have trained elsewhere meanwhile."""

    def worker(transport: Transport) -> Any:
        through = Setup(by_name(name), transport)
        through.train(0, 5)
        save(through, tmp_path / "a", extras={"schedule": through.schedule.state_dict(), "rank": transport.rank})
        through.train(5, 8)
        resumed = Setup(by_name(name), transport)
        resumed.train(0, 2)
        loaded = load(resumed, tmp_path / "a")
        assert (loaded.step, loaded.saved_size, loaded.size, loaded.extras["rank"]) == (5, N, N, transport.rank)
        resumed.schedule.load_state_dict(loaded.extras["schedule"])
        resumed.train(5, 8)
        return through.save(), resumed.save()

    for through, resumed in run_simulated(N, worker):
        assert equal(through, resumed)


def test_what_is_written_once_comes_back_as_tensors_of_their_own(tmp_path: Path) -> None:
    """Adam keeps equal step counters, one for each parameter: in one place they would count as many steps as there are parameters."""

    def made() -> tuple[torch.nn.Module, Any]:
        model = mlp()
        return model, DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), model.named_parameters())

    def train(model: torch.nn.Module, optimizer: Any) -> None:
        for step in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch(0, step)[0]), batch(0, step)[1]).backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer, optimizer.compression)
    again, resumed = made()
    load_checkpoint(tmp_path, again, resumed, resumed.compression)
    train(model, optimizer)
    train(again, resumed)
    assert [float(s["step"]) for s in resumed.state.values()] == [6.0] * len(list(model.parameters()))
    assert torch.equal(weights(model), weights(again))


def test_what_is_equal_on_all_ranks_is_written_once(tmp_path: Path) -> None:
    """Weights and momentum are in rank 0's part; the others hold their residuals. Nothing but parts, manifest and lock is left."""
    trained(tmp_path / "a", name="top_k")
    sizes = [part(tmp_path / "a", r).stat().st_size for r in range(N)]
    model = sum(p.numel() for p in mlp().parameters()) * 4
    assert sizes[0] > 2 * model
    assert all(s < 1.5 * model for s in sizes[1:])
    assert {p.name for p in (tmp_path / "a").iterdir()} == {part(tmp_path / "a", r).name for r in range(N)} | {"manifest.json", "saving.lock"}


def test_extras_come_back_as_they_were(tmp_path: Path) -> None:
    setup = Setup(CASE, SelfTransport())
    steps = torch.optim.lr_scheduler.MultiStepLR(setup.optimizer, [2, 2, 5])
    w = torch.arange(6.0).view(2, 3)
    extras = {
        "words": ["a", None, True, 3, 0.1, 1e300, 5e-324, -0.0],
        "infinite": (math.inf, -math.inf),
        "schedule": steps.state_dict(),
        "$odd": {1: "one", "1": "text", None: 0},
        "tensors": [w, w.t(), w[:, 1], torch.tensor(3), torch.empty(0), torch.ones(2, dtype=torch.bfloat16), torch.tensor([True])],
        "generator": torch.get_rng_state(),
    }
    save(setup, tmp_path / "a", extras=extras)
    back = load(setup, tmp_path / "a").extras
    assert equal(back["tensors"][1], w.t())
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(extras["tensors"], back["tensors"]))  # type: ignore[arg-type]
    assert isinstance(back["schedule"]["milestones"], Counter)
    steps.load_state_dict(back["schedule"])
    for key in ("words", "infinite", "schedule", "$odd", "generator"):
        assert equal(extras[key], back[key]), key
        assert type(extras[key]) is type(back[key])
    with pytest.raises(CheckpointError, match=r"extras/x/0.*builtins\.set"):
        save(setup, tmp_path / "a", extras={"x": [{1}]})
    assert equal(load(setup, tmp_path / "a").extras["words"], extras["words"])


def test_extras_that_people_have(tmp_path: Path) -> None:
    """Keys that look like paths, the states of generators, NumPy's numbers, bytes; also on another number of workers. (Their encoding by itself is
    tested in tests/property/test_trees.py.)"""
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    generator, shuffled = np.random.RandomState(3), random.Random(4)
    extras = {
        "meeting": [{"val/loss": one, "val": {"loss": two}}, {0: one, "0": two}, {"a/0": one, "a": [two]}],
        "numpy": generator.get_state(),
        "python": shuffled.getstate(),
        "best": np.arange(4)[::-1].argmax(),
        "accuracy": np.float64(0.1),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "pickle": b"\x80\x04",
        "spectrum": torch.tensor([1 + 2j], dtype=torch.complex128).conj(),  # which safetensors does not know
        "file": os.fsdecode(b"caf\xe9"),
        "halves": "\ud83d\ude00",  # two characters, of which plain JSON makes one
    }
    expected = [generator.rand(3).tolist(), shuffled.random()]

    def saving(transport: Transport) -> None:
        save(Setup(CASE, transport), tmp_path, extras=extras)

    run_simulated(2, saving)
    for n in (2, 1):
        for loaded in run_simulated(n, lambda transport: load(Setup(CASE, transport), tmp_path)):
            back = loaded.extras
            pairs = [list(item.values()) for item in back["meeting"]]
            assert [list(item) for item in back["meeting"]] == [["val/loss", "val"], [0, "0"], ["a/0", "a"]]
            assert [float(pair[0]) for pair in pairs] == [1.0] * 3
            assert [float(pairs[0][1]["loss"]), float(pairs[1][1]), float(pairs[2][1][0])] == [2.0] * 3
            generator.set_state(back["numpy"])
            shuffled.setstate(back["python"])
            assert [generator.rand(3).tolist(), shuffled.random()] == expected
            assert (type(back["best"]), back["best"]) == (np.int64, 0)
            assert (type(back["accuracy"]), back["accuracy"]) == (np.float64, 0.1)
            assert back["array"].dtype == np.int16 and back["array"].tolist() == [[0, 3], [1, 4], [2, 5]]
            assert back["pickle"] == extras["pickle"] and (back["file"], back["halves"]) == (extras["file"], extras["halves"])
            assert back["spectrum"].dtype == torch.complex128 and back["spectrum"].tolist() == [1 - 2j]


def test_a_checkpoint_of_the_first_version_loads_bit_for_bit() -> None:
    """tests/unit/format1 was written by two workers before keys were escaped and NumPy's types were known. Its numbers are short in binary."""

    def worker(transport: Transport) -> Any:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        inner = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
        compression = Compression.double_squeeze(dense_below=0, dense_1d=False)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), compression, transport=transport)
        loaded = load_checkpoint(Path(__file__).parent / "format1", model, optimizer, optimizer.compression)
        return loaded, model.state_dict(), optimizer.state_dict()["state"], optimizer.compression.state_dict()

    for rank, (loaded, model, optimizer, compression) in enumerate(run_simulated(2, worker)):
        assert [t.tolist() for t in model.values()] == [
            [[-0.407343745231628418, -0.157343760132789612], [-0.158593744039535522, 0.0914062559604644775]],
            *[[-0.313437491655349731, -0.189062505960464478]] * 3,
            [0.0, 0.0],
            [1.0, 1.0],
            0,
        ]
        assert [state["momentum_buffer"].tolist() for state in optimizer.values()] == [
            [[-24.78125, -24.78125], [25.46875, 25.46875]],
            *[[-12.3125, 12.8125]] * 3,
        ]
        assert (compression["step"], compression["undone"]) == (3, 0)
        weight = compression["parameters"]["0.weight"]
        assert weight["previous_lr"] == 0.5 * 0.1 * 0.1
        assert weight["residual"].tolist() == [[-12 + rank / 8, 13.125 + rank / 8]] * 2
        assert weight["server_residual"].tolist() == [0.0] * (4 * (1 - rank))
        assert all(compression["parameters"][name]["residual"].tolist() == [0.4375 + rank / 8] * 2 for name in ("0.bias", "1.weight", "1.bias"))
        extras = loaded.extras
        assert extras["a/b"].tolist() == [1.5, rank]
        assert extras["$odd"] == {1: "one", "1": "text", None: 0}
        assert extras["words"] == ["a", None, True, 3, 0.1, 2**70]
        assert extras["infinite"] == (math.inf, -math.inf) and math.isnan(extras["nan"])
        assert type(extras["counts"]) is Counter and extras["counts"] == {"x": 2}
        assert extras["schedule"]["milestones"] == Counter({2: 2, 5: 1})
        assert extras["nested"]["deep"][0].item() == 3 and extras["nested"]["deep"][1]["t"].dtype == torch.bfloat16
        assert extras[""][""].tolist() == [True]


# -- wrong use -----------------------------------------------------------------------------------------------------------------


def test_only_between_steps(tmp_path: Path) -> None:
    setup = Setup(CASE, SelfTransport())
    setup.train(0, 1)
    save(setup, tmp_path)
    x, y = batch(0, 1)
    torch.nn.functional.cross_entropy(setup.model(x), y).backward()
    for attempt in (save, load):
        with pytest.raises(CompressionError, match=r"between a backward pass and its optimizer\.step\(\)"):
            attempt(setup, tmp_path)
    setup.optimizer.step()
    save(setup, tmp_path)


def test_what_is_not_bound_or_anothers(tmp_path: Path) -> None:
    setup, other = Setup(CASE, SelfTransport()), Setup(CASE, SelfTransport())
    with pytest.raises(CheckpointError, match=r"Compression\.none\.bind\(model\)"):
        save_checkpoint(tmp_path, setup.model, setup.optimizer, Compression.none)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"optimizer\.compression"):
        save_checkpoint(tmp_path, setup.model, setup.optimizer, other.compression)
    with pytest.raises(CompressionError, match="DistributedOptimizer first"):
        save_checkpoint(tmp_path, setup.model, torch.optim.SGD(setup.model.parameters()), CASE.make().bind(setup.model))


def test_without_safetensors_saving_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(That `import hvd_ecsgd` does without is in test_rooms.py.)"""
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        save(Setup(CASE, SelfTransport()), tmp_path)


def test_parameters_are_left_where_they_were(tmp_path: Path) -> None:
    """DEF trains at a shifted point: saving shows x and goes on from the shift, with the bits of a run that was not saved."""

    def worker(transport: Transport) -> Any:
        finals = []
        for saving in (True, False):
            setup = Setup(by_name("detached"), transport)
            setup.train(0, 3)
            if saving:
                held = flat(setup.model.parameters())
                save(setup, tmp_path)
                assert torch.equal(flat(setup.model.parameters()), held)
            setup.train(3, 5)
            finals.append(weights(setup.model, setup.compression))
        return finals

    results = run_simulated(N, worker)
    assert all(torch.equal(a, b) for a, b in results)
    assert same_bits(a for a, _ in results)
