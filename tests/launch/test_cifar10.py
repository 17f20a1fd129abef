"""examples/cifar10.py: the loader on tiny files of the official form, the models, the papers' settings, and two steps on real ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import horovodrun, mpirun, require_horovod

PROGRAM = Path(__file__).parents[2] / "examples" / "cifar10.py"
IMAGES = 24


def program() -> Any:
    """The example as a module."""
    if "cifar10_example" not in sys.modules:
        spec = importlib.util.spec_from_file_location("cifar10_example", PROGRAM)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["cifar10_example"] = module
        spec.loader.exec_module(module)
    return sys.modules["cifar10_example"]


def entry(seed: int, n: int = IMAGES) -> dict[bytes, Any]:
    rng = np.random.default_rng(seed)
    return {
        b"batch_label": b"tiny",
        b"labels": [int(y) for y in rng.integers(0, 10, n)],
        b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
        b"filenames": [b"image_%d.png" % i for i in range(n)],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("cifar-10-batches-py")
    for seed, name in enumerate(program().FILES):
        (path / name).write_bytes(pickle.dumps(entry(seed), protocol=2))
    return path


def test_the_loader_reads_what_was_written(folder: Path) -> None:
    """Pixels in their places: 1024 red, then green, then blue, row by row."""
    data = program().load_data(folder, check_md5=False)
    assert data.train_images.shape == (5 * IMAGES, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert data.test_images.shape == (IMAGES, 3, 32, 32)
    second = entry(1)
    assert data.train_labels[IMAGES : 2 * IMAGES].tolist() == second[b"labels"]
    assert data.train_images[IMAGES + 3, 2, 5, 7] == second[b"data"][3, 2048 + 5 * 32 + 7]
    assert not torch.equal(data.train_images[:IMAGES], data.train_images[IMAGES : 2 * IMAGES]), "control"


class Shell:
    """What a hostile pickle would do."""

    def __reduce__(self) -> Any:
        return os.system, ("echo hacked >&2",)


WRONG: dict[str, tuple[Any, str]] = {
    "code": ({b"data": Shell(), b"labels": []}, r"refers to posix\.system"),
    "no labels": ({b"data": entry(0)[b"data"]}, r"keys b'data' and b'labels', got \[\"b'data'\"\]"),
    "text keys": ({"data": 0, "labels": 0}, "keys b'data'"),
    "a list": ([1, 2], "got list"),
    "floats": (entry(0) | {b"data": np.zeros((IMAGES, 3072))}, r"uint8 of shape \(n, 3072\), got float64"),
    "grey": (entry(0) | {b"data": np.zeros((IMAGES, 1024), np.uint8)}, r"got uint8 of shape \(24, 1024\)"),
    "too few labels": (entry(0) | {b"labels": [1]}, "must be 24 integers"),
    "a label of 10": (entry(0) | {b"labels": [10] * IMAGES}, "from 0 to 9"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_named(what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, message = WRONG[what]
    file = tmp_path / "data_batch_2"
    file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(program().DataError, match=f"data_batch_2: .*{message}"):
        program().load_file(file, check_md5=False)
    assert "hacked" not in capfd.readouterr().err
    with pytest.raises(program().DataError, match=r"md5 is .*d4bba439e000b95fd0a9bffe97cbabec"):
        program().load_file(file)


def test_missing_and_cut_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(program().DataError, match=r"test_batch: No such file.*cifar-10-python\.tar\.gz"):
        program().load_file(tmp_path / "test_batch")
    cut = tmp_path / "data_batch_1"
    cut.write_bytes((folder / "data_batch_1").read_bytes()[:5000])
    with pytest.raises(program().DataError, match="data_batch_1: not a pickle"):
        program().load_file(cut, check_md5=False)


def test_augmentation_crops_and_mirrors() -> None:
    """Every result is a shifted image or its mirror; over many draws all 81 places and both directions come."""
    image = torch.arange(1, 3 * 32 * 32 + 1).remainder(251).to(torch.uint8).view(1, 3, 32, 32) + 1
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    places = {}
    for flipped in (False, True):
        for top in range(9):
            for left in range(9):
                crop = padded[0, :, top : top + 32, left : left + 32]
                places[(crop.flip(-1) if flipped else crop).numpy().tobytes()] = (flipped, top, left)
    seen = program().augmented(image.expand(3000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert {places[one.contiguous().numpy().tobytes()] for one in seen} == set(places.values())


def test_the_models_are_the_papers() -> None:
    """Parameters at full width, and that a narrow one trains."""
    for model, count in ((program().resnet18, 11_173_962), (program().vgg16_bn, 14_728_266)):
        with torch.device("meta"):
            assert sum(p.numel() for p in model().parameters()) == count
        narrow = model(2)
        narrow(torch.randn(4, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in narrow.parameters())


def test_the_settings_are_the_papers() -> None:
    configs = program().CONFIGS
    squeeze, detached, ef = configs["doublesqueeze-ternary"], configs["def"], configs["def-ef"]
    assert (squeeze.batch, squeeze.lr, squeeze.momentum, squeeze.milestones[0] * squeeze.epochs) == (256, 0.08, 0.0, 20)
    assert (detached.batch, detached.lr, detached.epochs, detached.momentum, detached.weight_decay) == (16, 0.05, 200, 0.9, 5e-4)
    assert detached.milestones == (0.5, 0.75) and ef.lr == 0.01
    assert detached.compression().method.compressor.ratio == 64 and detached.compression().method.feedback.lambda_ == 0.3
    assert configs["doublesqueeze-topk"].compression().method.compressor.ratio == pytest.approx(1 / 0.027)


def weights(printed: str) -> str:
    found = re.search(r"after 2 steps, .* weights ([0-9a-f]{16})", printed)
    assert found, printed
    return found.group(1)


def arguments(folder: Path, config: str) -> tuple[str, ...]:
    return "--data", str(folder), "--config", config, "--steps", "2", "--width", "2", "--batch", "8", "--no-md5"


@pytest.mark.parametrize("config", ["def", "doublesqueeze-ternary"])
def test_two_steps_on_two_ranks(config: str, folder: Path, tmp_path: Path) -> None:
    """Over MPI, and the same weights on an unmodified Horovod."""
    printed = mpirun(2, PROGRAM, *arguments(folder, config), "--out", str(tmp_path / "r.json"))
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["steps"] == 2 and saved["workers"] == 2 and 0 <= saved["accuracy"] <= 1
    assert saved["weights"] == weights(printed)
    require_horovod()
    assert weights(horovodrun(2, PROGRAM, *arguments(folder, config), "--backend", "horovod")) == weights(printed)


def test_a_missing_folder_ends_every_rank_with_a_message(tmp_path: Path) -> None:
    printed = mpirun(2, PROGRAM, "--data", str(tmp_path / "none"), expect_failure=True)
    assert "Unpack cifar-10-python.tar.gz" in printed
