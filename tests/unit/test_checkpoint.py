"""save_checkpoint and load_checkpoint on simulated workers: what is written, and everything that can be wrong with it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_ecsgd import CheckpointError, Compression, CompressionError, DistributedOptimizer, checkpoint, load_checkpoint, save_checkpoint
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.cases import by_name
from tests.problems import batch, flat, mlp, same_bits, weights
from tests.unit.test_state import Setup, equal

N = 3
CASE = by_name("double_squeeze-everything")


def save(setup: Setup, folder: Path, **options: Any) -> None:
    save_checkpoint(folder, setup.model, setup.optimizer, setup.compression, **options)


def load(setup: Setup, folder: Path) -> checkpoint.Loaded:
    return load_checkpoint(folder, setup.model, setup.optimizer, setup.compression)


def trained(folder: Path, steps: int = 3, name: str = CASE.name, n: int = N, **options: Any) -> None:
    """`folder` holds what n workers saved after so many steps."""

    def worker(transport: Transport) -> None:
        setup = Setup(by_name(name), transport)
        setup.train(0, steps)
        save(setup, folder, **options)

    run_simulated(n, worker)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())  # type: ignore[no-any-return]


def part(folder: Path, r: int) -> Path:
    return folder / str(manifest(folder)["parts"][r]["file"])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "saving.lock"}


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
        "spectrum": torch.tensor([1 + 2j]).conj(),
        "file": os.fsdecode(b"caf\xe9"),
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
            assert back["pickle"] == extras["pickle"] and back["file"] == extras["file"]
            assert back["spectrum"].tolist() == [1 - 2j]


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


# -- damaged, and not of this training -------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(folder: Path, **changes: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps({**manifest(folder), **changes}))


def foreign(folder: Path) -> None:
    other = folder.parent / "other"
    trained(other)
    shutil.copy(part(other, 1), part(folder, 1))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "holds no checkpoint"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "holds no checkpoint"),
    "half a manifest": (lambda f: truncate(f / "manifest.json"), r"manifest\.json is damaged"),
    "another file": (lambda f: (f / "manifest.json").write_text("[]"), "is not the manifest"),
    "a later format": (lambda f: edit(f, format=99, library="hvd-ecsgd 9.9"), r"hvd-ecsgd 9\.9 in format 99"),
    "fewer parts than workers": (lambda f: edit(f, parts=manifest(f)["parts"][:2]), "names 2 parts of 3 workers"),
    "a part missing": (lambda f: part(f, 1).unlink(), r"rank00001\.safetensors, the part of rank 1 of 3, is missing"),
    "a part truncated": (lambda f: truncate(part(f, 2)), r"rank00002\.safetensors, the part of rank 2, is damaged"),
    "a bit flipped": (lambda f: flip(part(f, 2)), r"rank00002\.safetensors, the part of rank 2, is damaged: its checksum"),
    "a foreign part": (foreign, r"rank00001\.safetensors(, the part of rank 1, is damaged: \d| is not the part of rank 1 of this checkpoint)"),
    "parts exchanged": (
        lambda f: shutil.copy(part(f, 2), part(f, 1)),
        r"rank00001\.safetensors(, the part of rank 1, is| is not the part of rank 1)",
    ),
}


def refused(folder: Path, message: str, make: Callable[[Transport], Setup] = lambda transport: Setup(CASE, transport), steps: int = 2) -> None:
    """Every rank gets the error, and model, optimizer and compression are as before."""

    def worker(transport: Transport) -> None:
        setup = make(transport)
        setup.train(0, steps)
        before, held = setup.save(), flat(setup.model.parameters())
        with pytest.raises(CheckpointError, match=message):
            load(setup, folder)
        assert equal(setup.save(), before)
        assert torch.equal(flat(setup.model.parameters()), held)

    run_simulated(N, worker)


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_on_every_rank(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    trained(folder)
    change, message = DAMAGE[what]
    change(folder)
    refused(folder, message)


class Other(Setup):
    """The training, with something else in it."""

    def __init__(self, transport: Transport, compression: Any = None, model: Any = None, optimizer: Any = None) -> None:
        self.model = model or mlp()
        inner = optimizer(self.model) if optimizer else torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.optimizer = DistributedOptimizer(inner, self.model.named_parameters(), compression or CASE.make(), transport=transport)
        self.compression = self.optimizer.compression
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        self.rank = transport.rank


def wider(inputs: int = 20) -> Any:
    return torch.nn.Sequential(torch.nn.Linear(inputs, 65), torch.nn.ReLU(), torch.nn.Linear(65, 5))


def one_more() -> Any:
    model = mlp()
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    return model


def two_groups(model: Any) -> Any:
    return torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)


ALL: dict[str, Any] = {"dense_below": 0, "dense_1d": False}
OTHERS: dict[str, tuple[Callable[[Transport], Setup], str]] = {
    "method": (lambda t: Other(t, Compression.top_k(10, **ALL)), "another compressor.*Sign.*TopK"),
    "seed": (lambda t: Other(t, Compression.double_squeeze(**ALL, seed=4)), "another seed: 0 then, 4 now"),
    "dense_below": (lambda t: Other(t, Compression.double_squeeze(dense_1d=False)), "another dense_below"),
    "shape": (lambda t: Other(t, model=wider()), r"another model: '0\.weight' was \(64, 20\).*is \(65, 20\)"),
    "type": (lambda t: Other(t, model=mlp(torch.float64)), r"'0\.weight' was .*float32, and is .*float64"),
    "parameter": (lambda t: Other(t, model=one_more()), "the model, but not the checkpoint, has 'extra'"),
    "groups": (lambda t: Other(t, optimizer=two_groups), r"groups of \[2, 2\] parameters, the saved one had \[4\]"),
    "optimizer": (lambda t: Other(t, optimizer=lambda m: torch.optim.Adam(m.parameters())), "saved with SGD as the optimizer, and this is Adam"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_something_else_is_refused_on_every_rank(what: str, tmp_path: Path) -> None:
    trained(tmp_path / "a")
    make, message = OTHERS[what]
    refused(tmp_path / "a", message, make)


def test_one_rank_alone_that_differs_is_told_to_all(tmp_path: Path) -> None:
    def make(transport: Transport) -> Setup:
        model = mlp()
        if transport.rank == 1:
            model.register_buffer("extra", torch.zeros(3))
        return Other(transport, model=model)

    trained(tmp_path / "a")
    refused(tmp_path / "a", r"the model, but not the checkpoint, has 'extra'.*\(rank 1\)", make, 0)


class Modern(torch.nn.Module):
    """With extra state of three kinds, and complex tensors that are not trained."""

    class Extra(torch.nn.Module):
        def __init__(self, state: Any) -> None:
            super().__init__()
            self.state = state

        def get_extra_state(self) -> Any:
            return self.state

        def set_extra_state(self, state: Any) -> None:
            if isinstance(state, str):
                raise KeyError("amax")
            self.state = state

    def __init__(self, fill: float, *states: Any) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(20, 5)
        self.extras = torch.nn.ModuleList(map(self.Extra, states))
        self.frozen = torch.nn.ParameterList([torch.nn.Parameter(torch.full((2,), fill * 1j), requires_grad=False)])
        self.register_buffer("twiddle", torch.full((3,), fill - 2j, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


def test_extra_state_and_complex_tensors_of_a_model(tmp_path: Path) -> None:
    """Extra state may be any object, None, or a tensor, of another shape each time; also on another number of workers."""
    states = {"scale": np.float32(0.5), "history": [1, 2]}, torch.arange(3), None

    def saving(transport: Transport) -> None:
        setup = Other(transport, model=Modern(3.0, *states))
        setup.train(0, 2)
        save(setup, tmp_path)

    def loading(transport: Transport) -> Modern:
        setup = Other(transport, model=Modern(0.0, None, torch.zeros(7), "fresh"))
        load(setup, tmp_path)
        return setup.model

    run_simulated(2, saving)
    for n in (2, 1):
        for model in run_simulated(n, loading):
            assert equal(model.extras[0].state, states[0]) and type(model.extras[0].state["scale"]) is np.float32
            assert torch.equal(model.extras[1].state, states[1]) and model.extras[2].state is None
            assert model.frozen[0].tolist() == [3j, 3j]
            assert model.twiddle.tolist() == [3 - 2j] * 3


def test_what_only_loading_can_tell_is_told_to_all_ranks(tmp_path: Path) -> None:
    """A module's own code fails on one rank, when some of it is loaded already."""

    def worker(transport: Transport) -> None:
        setup = Other(transport, model=Modern(0.0, 1))
        setup.model.extras[0].state = "bad" if transport.rank == 1 else 1
        save(setup, tmp_path)
        with pytest.raises(CheckpointError, match=r"in part only.*KeyError: 'amax'.*load again, or start anew\. \(rank 1\)"):
            load(setup, tmp_path)

    run_simulated(2, worker)


def expanded(model: Any) -> None:
    model[0].register_buffer("mask", torch.ones(1).expand(4))


def inference(model: Any) -> None:
    with torch.inference_mode():
        model[0].register_buffer("mask", torch.ones(4))


def without_memory(model: Any) -> None:
    model[0].register_buffer("mask", torch.ones(4, device="meta"))


UNWRITABLE = {
    "expanded": (expanded, r"'0\.mask' is an expanded tensor.*\.clone\(\)"),
    "inference": (inference, r"'0\.mask' was made inside torch\.inference_mode"),
    "meta": (without_memory, r"'0\.mask' is on the meta device"),
}


@pytest.mark.parametrize("what", UNWRITABLE)
def test_what_cannot_be_written_to_is_named_before_anything_is_written(what: str, tmp_path: Path) -> None:
    """On one rank, to all. Saved was an ordinary buffer; an expanded one can be saved (control)."""
    change, message = UNWRITABLE[what]

    def saving(transport: Transport) -> None:
        setup = Setup(CASE, transport)
        setup.model[0].register_buffer("mask", torch.ones(1).expand(4) if transport.rank == 0 else torch.ones(4))
        setup.train(0, 2)
        save(setup, tmp_path)

    def loading(transport: Transport) -> None:
        setup = Setup(CASE, transport)
        change(setup.model) if transport.rank == 1 else setup.model[0].register_buffer("mask", torch.zeros(4))
        held = flat(setup.model.parameters())
        with pytest.raises(CheckpointError, match=message):
            load(setup, tmp_path)
        assert torch.equal(flat(setup.model.parameters()), held)
        setup.model[0].mask = torch.zeros(4)
        load(setup, tmp_path)
        assert setup.model[0].mask.tolist() == [1.0] * 4
        assert not torch.equal(flat(setup.model.parameters()), held)

    run_simulated(2, saving)
    run_simulated(2, loading)


# -- saving that fails -----------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_on_one_rank_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a"

    def worker(transport: Transport) -> Any:
        setup = Setup(CASE, transport)
        setup.train(0, 2)
        save(setup, folder)
        transport.allreduce_(torch.zeros(1), "all are here").wait()
        before = contents(folder)
        setup.train(2, 3)
        with pytest.raises(CheckpointError, match=r"No space left.*\(rank 2\)"):
            save(setup, folder)
        transport.allreduce_(torch.zeros(1), "all are here").wait()
        after = contents(folder)
        transport.allreduce_(torch.zeros(1), "all are here").wait()
        monkeypatch.undo()
        save(setup, folder)
        again = Setup(CASE, transport)
        return before == after, load(again, folder).step

    written = Counter[str]()

    def sync(path: Path) -> int:
        written[path.name[-14:]] += 1
        if path.name.endswith("rank00002.tmp") and written[path.name[-14:]] == 2:
            raise OSError(28, "No space left on device", str(path))
        return real(path)

    real = checkpoint.parts._sync
    monkeypatch.setattr(checkpoint.parts, "_sync", sync)
    assert run_simulated(N, worker) == [(True, 3)] * N


FULL = """
import sys, torch
from pathlib import Path
from hvd_ecsgd import Compression, CheckpointError, DistributedOptimizer, load_checkpoint, save_checkpoint
p = torch.nn.Linear(100, 100)
optimizer = DistributedOptimizer(torch.optim.SGD(p.parameters(), lr=0.1), p.named_parameters(), Compression.top_k())
folder = Path(sys.argv[1])
save_checkpoint(folder, p, optimizer, optimizer.compression)
before = {f.name: f.read_bytes() for f in folder.iterdir()}
if sys.argv[2] == "read-only":
    import subprocess
    subprocess.run(["mount", "-o", "remount,ro", str(folder.parent)], check=True)
try:
    save_checkpoint(folder, p, optimizer, optimizer.compression, extras=torch.randn(200_000))
except CheckpointError as error:
    print("refused:", error)
assert before == {f.name: f.read_bytes() for f in folder.iterdir()}
load_checkpoint(folder, p, optimizer, optimizer.compression)
"""


@pytest.mark.parametrize(("kind", "message"), [("full", "No space left on device"), ("read-only", "Read-only file system")])
def test_a_full_and_a_read_only_disk(kind: str, message: str, tmp_path: Path) -> None:
    """A small file system in memory, in a mount namespace of its own. The control is the save before, which fits."""
    mount = f'mount -t tmpfs -o size=500k tmpfs {tmp_path} && exec {sys.executable} -c "$PROGRAM" {tmp_path}/a {kind}'
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {tmp_path}"], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    env = {**os.environ, "PROGRAM": FULL}
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout
    assert message in done.stdout


def test_two_jobs_in_one_directory(tmp_path: Path) -> None:
    """Whoever did not save or load what is there does not replace it, unless told to; each alone may (the control)."""

    def worker(transport: Transport) -> int:
        one, two = Setup(CASE, transport), Setup(CASE, transport)
        one.train(0, 1)
        save(one, tmp_path)
        save(one, tmp_path)
        two.train(0, 2)
        with pytest.raises(CheckpointError, match=r"a checkpoint \(step 1, 3 workers\) that this training neither saved nor loaded"):
            save(two, tmp_path)
        save(two, tmp_path, overwrite=True)
        with pytest.raises(CheckpointError, match="step 2"):
            save(one, tmp_path)
        load(one, tmp_path)
        save(one, tmp_path)
        return load(two, tmp_path).step

    assert run_simulated(N, worker) == [2] * N


def test_two_jobs_at_the_same_moment(tmp_path: Path) -> None:
    """While somebody holds the lock; a killed job holds none."""
    holder = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("job 7")
file.flush()
print("holding", flush=True)
time.sleep(60)
"""
    setup = Setup(CASE, SelfTransport())
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "saving.lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(CheckpointError, match=r"another job is saving to .* right now \(job 7\)"):
            save(setup, tmp_path)
        other.kill()
    save(setup, tmp_path)


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    setup = Setup(CASE, SelfTransport())
    for name in ("part-00-rank00000.safetensors", "part-00-rank00001.tmp", "manifest.json.00.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    save(setup, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([part(tmp_path, 0).name, "manifest.json", "notes.txt", "saving.lock"])


# -- wrong use -------------------------------------------------------------------------------------------------------------------


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


def test_the_library_is_imported_without_safetensors() -> None:
    """`import hvd_ecsgd` needs torch and NumPy; without safetensors, saving says what to install."""
    code = """
import sys
sys.modules["safetensors"] = None
import torch, hvd_ecsgd
p = torch.nn.Linear(2, 2)
optimizer = hvd_ecsgd.DistributedOptimizer(torch.optim.SGD(p.parameters(), lr=0.1), p.named_parameters())
try:
    hvd_ecsgd.save_checkpoint(sys.argv[1], p, optimizer, optimizer.compression)
except hvd_ecsgd.CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, os.devnull + "-nowhere"], capture_output=True, text=True, timeout=60)
    assert "pip install safetensors" in done.stdout, done.stdout + done.stderr


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
