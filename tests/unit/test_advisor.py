"""The advisor's arithmetic, and what it weighs; its measurements are tried on ranks (tests/launch/test_advise.py)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError
from hvd_ecsgd.advisor import CANDIDATES, Cost, Network, advise, connect, cost_of, measure, recommended, step_seconds
from hvd_ecsgd.evidence import STEPS
from hvd_ecsgd.transport import Transport, run_simulated
from hvd_ecsgd.transport.echo import EchoTransport, Sent
from tests.problems import mlp

STEEP = Network(4, {op: [(1000, 0.001), (2000, 0.002), (4000, 0.008)] for op in ("allreduce", "allgather", "alltoall")}, 1.0)


def test_times_lie_on_the_lines_between_what_was_measured() -> None:
    seconds = {size: STEEP.seconds(Sent("allreduce", size)) for size in (1, 1000, 1500, 2000, 3000, 4000, 6000)}
    assert seconds == pytest.approx({1: 0.001, 1000: 0.001, 1500: 0.0015, 2000: 0.002, 3000: 0.005, 4000: 0.008, 6000: 0.014})
    assert STEEP.seconds(Sent("broadcast", 3000)) == STEEP.seconds(Sent("allgather", 3000))
    assert STEEP.rate == pytest.approx(8 * 1.5 * 2000 / 0.006)  # 2(n−1)/n of the bytes go over a link


def test_another_rate_keeps_the_latency() -> None:
    tenth = STEEP.at_rate(STEEP.rate / 10)
    assert tenth.latency == STEEP.latency and tenth.rate == pytest.approx(STEEP.rate / 10)
    assert tenth.seconds(Sent("alltoall", 4000)) == pytest.approx(0.001 + 10 * 0.007)


def test_a_step_is_no_shorter_than_its_parts_and_no_longer_than_all_of_them() -> None:
    for wire in (0, 1000, 100_000):
        for megabytes in (1, 60, 400):
            cost = Cost(0.3, [Sent("allreduce", wire)], 0)
            seconds, network = step_seconds(1.2, cost, STEEP, megabytes * 2**20), STEEP.total(cost.sent)
            assert max(1.2 + 0.3, network) <= seconds + 1e-12 <= 1.2 + 0.3 + network + 1e-9
    alone = step_seconds(1.2, Cost(0.3, [Sent("allreduce", 4000)], 0), STEEP, 2**20)
    assert alone == pytest.approx(1.5 + 0.008), "one bucket travels when all is computed"


def test_compression_must_be_worth_it_and_known_to_keep_the_accuracy() -> None:
    assert recommended({"none": 1.0, "fp16": 0.95, "power_sgd(2)": 0.95}) == "none"
    assert recommended({"none": 1.0, "fp16": 0.7, "power_sgd(2)": 0.6, "one_bit()": 0.1}) == "fp16", "more steps, each of them shorter"
    assert recommended({"none": 1.0, "fp16": 0.7, "power_sgd(2)": 0.3, "one_bit()": 0.1}) == "power_sgd(2)"


def test_advisor_and_auto_decide_by_the_same_evidence() -> None:
    """That of hvd_ecsgd/evidence.py."""
    assert {name: c.steps for name, c in CANDIDATES.items() if c.steps is not None} == dict(STEPS)
    tuner = Compression.auto().tuner()
    assert tuner.steps == {name: STEPS[named] for name, named in {"none": "none", "fp16": "fp16", "power_sgd": "power_sgd(2)"}.items()}
    assert tuner.candidates["power_sgd"].method.exchange == CANDIDATES["power_sgd(2)"].make().method.exchange


def test_what_methods_send_is_what_they_send_on_a_network() -> None:
    """The list of a process that stands for all, against the traffic of simulated workers: bytes of payloads in a step, and none without compression
    is the model's."""
    named = list(mlp().named_parameters())
    bytes_of_model = sum(p.nbytes for _, p in named)

    def worker(transport: Transport) -> dict[str, Cost]:
        return {name: cost_of(c.make, list(mlp().named_parameters()), transport, repeats=1) for name, c in CANDIDATES.items()}

    first, second = run_simulated(2, worker)
    for name, cost in first.items():
        assert cost.kernels == second[name].kernels > 0, "the slowest rank's, on all"
        assert (cost.memory > 0) == (name not in ("none", "fp16", "qsgd()"))
    sent = {name: sum(s.bytes for s in cost.sent) for name, cost in first.items()}
    overhead = sent["none"] - bytes_of_model
    assert 0 < overhead < 500, "the comparison of settings"
    assert sent["fp16"] - overhead < 0.8 * bytes_of_model  # small tensors stay in float32
    assert sent["top_k(100)"] < sent["fp16"]


def test_an_echo_is_what_workers_send_who_hold_the_same() -> None:
    echo = EchoTransport(1, 3)
    rows = torch.arange(6.0).view(3, 2)
    assert [t.tolist() for t in echo.alltoall(rows, [1, 1, 1], "a").wait()] == [[[2.0, 3.0]]] * 3
    assert [len(t) for t in echo.allgather(rows, "g", [3, 3, 4]).wait()] == [3, 3, 4]
    assert echo.sent == [Sent("alltoall", 24), Sent("allgather", 24)]


def test_every_rank_measures_the_same_network() -> None:
    first, *others = run_simulated(3, lambda transport: measure(transport, sizes=(4_000, 64_000)))
    assert all(network == first for network in others) and first.spread >= 1
    assert all([size for size, _ in points] == [3996, 63996] for points in first.points.values())


def options(**more: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"parameters": 1e5, "model": None, "compute": None, "methods": ["fp16"], "network": None, "json": None, "plot": None, **more}
    )


def not_a_model() -> int:
    return 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"parameters": 10}, "--parameters must be at least 1000, got 10"),
        ({"parameters": 1e13}, "GB on this machine"),
        ({"model": "tests.problems"}, "must be module:function"),
        ({"model": "no_such_module.models:make"}, "no module 'no_such_module' in .* PYTHONPATH"),
        ({"model": "tests.problems:no_such_function"}, "'tests.problems' has no function 'no_such_function'"),
        ({"model": "tests.unit.test_advisor:not_a_model"}, "returned 3; expected a torch module"),
        ({"model": "tests.problems:mlp"}, "give --compute SECONDS"),
    ],
)
def test_wrong_use_is_named(more: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_ecsgd.advisor.command.connect", lambda network: EchoTransport(0, 2))
    if more.get("parameters") == 1e13:
        monkeypatch.setattr("hvd_ecsgd.advisor.command._made_up", lambda parameters: Huge())
    with pytest.raises(CompressionError, match=message):
        advise(options(**more))


MODEL = "import torch\n\ndef make():\n    return torch.nn.Linear(1, 1), print\n"


def test_a_model_is_found_in_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the script of an installed command lies is elsewhere. What the module itself fails to import is not taken for it (a control)."""
    (tmp_path / "model_of_a_reader.py").write_text(MODEL)
    (tmp_path / "model_that_needs_more.py").write_text("import no_such_module\n" + MODEL)
    monkeypatch.setattr("hvd_ecsgd.advisor.command.connect", lambda network: EchoTransport(0, 2))
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert advise(options(model="model_of_a_reader:make", compute=1.0)) == 0
    assert "2 parameters, 1000 ms of computation" in capsys.readouterr().out
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        advise(options(model="model_that_needs_more:make"))


class Huge(torch.nn.Module):
    """Says that it has more parameters than fit."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.empty(10**6, 10**7, device="meta"))


def test_without_a_backend_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_ecsgd.advisor.command.NETWORKS", {"mpi": ("no_such_backend", "", "")})
    with pytest.raises(CompressionError, match="no_such_backend cannot be imported"):
        connect("mpi")


def test_one_rank_has_nothing_to_exchange(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("hvd_ecsgd.advisor.command.connect", lambda network: EchoTransport(0, 1))
    assert advise(options()) == 0
    assert "nothing is exchanged, so do not compress" in capsys.readouterr().out
