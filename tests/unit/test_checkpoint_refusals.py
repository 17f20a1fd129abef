"""Checkpoints that are damaged or not of this training, and models that cannot be saved: named on every rank."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_ecsgd import CheckpointError, Compression, DistributedOptimizer
from hvd_ecsgd.transport import SelfTransport, Transport, run_simulated
from tests.problems import flat, mlp
from tests.unit.checkpoints import CASE, N, load, manifest, part, save, trained
from tests.unit.test_state import Setup, equal


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


@pytest.mark.parametrize("call", [save, load])
def test_another_model_than_the_one_that_is_trained(call: Callable[[Setup, Path], object], tmp_path: Path) -> None:
    """A copy, whose weights would be saved beside residuals that are not theirs, or the optimizer in its place; nothing is written. What wraps the
    model holds the same parameters, and is none of these (the control)."""
    setup = Setup(CASE, SelfTransport())
    trained(tmp_path / "a", n=1)
    model, before = setup.model, manifest(tmp_path / "a")
    for wrong, message in [
        (copy.deepcopy(model), "holds none of the parameters"),
        (setup.optimizer, "expected the torch.nn.Module that is trained, got SGD"),
    ]:
        setup.model = wrong
        with pytest.raises(CheckpointError, match=message):
            call(setup, tmp_path / "a")
    assert manifest(tmp_path / "a") == before
    setup.model = torch.nn.Sequential(model)
    save(setup, tmp_path / "b")
    load(setup, tmp_path / "b")
