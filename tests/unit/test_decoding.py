"""Payloads with a code for each element are decoded in one pass over the result, which tells sums of it, with the bits of one after the other."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, GradientExchange
from hvd_ecsgd.compressors import QSGD, Natural, Sign, Ternary, TopK
from hvd_ecsgd.exchange import AllGather, CompSkip, Every, TwoPass
from hvd_ecsgd.feedback import MemSGD
from hvd_ecsgd.kernels import native
from hvd_ecsgd.kernels.library import FILE, Library
from hvd_ecsgd.protocols import add_sum_, decode_sum_, extracted, sums_for
from hvd_ecsgd.segments import Key, Segments
from hvd_ecsgd.transport import Transport, run_simulated
from hvd_ecsgd.values import Sums
from tests.unit.test_kernels import KEY, compiled, library, same, table, values, variants

SIZES = [70, 0, 1, 5000, 333]
ALL = [Sign(), Sign("l2", 8), Sign("l1", 50), Sign("l1", 4096), Ternary(), Natural(), QSGD(), QSGD(7, 50), QSGD(1, 16)]


class Counted(Library):
    """Counts calls of kernels, and those of `sign_extract` that are told sums, over all threads."""

    def __init__(self) -> None:
        super().__init__(FILE)
        self.calls = Counter[str]()

    def call(self, name: str, *arguments: Any) -> int:
        self.calls[name] += 1
        self.calls["told"] += name == "sign_extract" and arguments[7] != 0
        return super().call(name, *arguments)


def payloads_of(compressor: Any, segments: Segments, kind: str, n: int) -> list[tuple[torch.Tensor, Key]]:
    keys = [replace(KEY, rank=r) for r in range(n)]
    end = max(s.stop for s in segments)
    return [(compressor.extract_(values(kind, end, segments.dtype, r), segments, key), key) for r, key in enumerate(keys)]


def results(compressor: Any, segments: Segments, payloads: list[tuple[torch.Tensor, Key]], buffer: torch.Tensor) -> list[torch.Tensor]:
    """`payloads` over `buffer`, assigned, in a buffer with more around; and added, in one of its own."""
    assigned = buffer.clone()
    decode_sum_(assigned, compressor, segments, payloads, 1 / 3)
    mine, found = segments.compact, [assigned]
    for alpha in (1.0, 1 / 3):
        found.append(buffer[1 : 1 + mine.numel].clone())
        add_sum_(found[-1], compressor, mine, payloads, alpha)
    return found


def differences() -> Iterator[tuple[Any, ...]]:
    """What the kernels in use give otherwise than the reference does, payload after payload."""
    for compressor, kind, dtype in itertools.product(ALL, ("gaussian", "not finite"), (torch.float32, torch.float64)):
        segments = table(SIZES, dtype).piece(1, 3)
        buffer = values("ties", sum(SIZES), dtype, 9)
        payloads = payloads_of(compressor, segments, kind, 4)
        for n in (1, 2, 4)[:: 1 + (dtype == torch.float64)]:
            ours = results(compressor, segments, payloads[:n], buffer)
            with native.forced(None):
                theirs = results(compressor, segments, payloads[:n], buffer)
            yield from ((compressor, kind, dtype, n, i) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not same(a, b))


def decode_everything() -> None:
    """Also under sanitizers, by tests/unit/test_kernels.py."""
    assert not list(differences())


@compiled
def test_together_is_one_after_the_other() -> None:
    """On every variant: assigned and added, of pieces that begin anywhere; what is outside of the table is not touched."""
    for _ in variants():
        decode_everything()


@compiled
def test_the_order_of_ranks_matters() -> None:
    """Control: in another order payloads add to other bits."""
    segments = table(SIZES, torch.float32)
    payloads, zeros = payloads_of(QSGD(), segments, "gaussian", 4), torch.zeros(segments.numel + 1)
    with native.forced(library):
        assert not same(results(QSGD(), segments, payloads, zeros)[0], results(QSGD(), segments, payloads[::-1], zeros)[0])


@compiled
@pytest.mark.parametrize("server", [Sign(), Sign("l2"), Ternary(), Ternary("l1")], ids=str)
def test_sums_are_those_of_a_pass_of_their_own(server: Any) -> None:
    """On every variant and in two threads, of one payload and several, assigned and added: the server's payload and what it leaves."""
    segments = table([33_000, 0, 70, 32_768, 1], torch.float32)
    payloads = payloads_of(Natural(), segments, "heavy-tailed", 3)
    for _, threads, n, decode in itertools.product(variants(), (1, 2), (1, 3), (decode_sum_, add_sum_)):
        torch.set_num_threads(threads)
        one = values("gaussian", segments.numel, torch.float32, 5)
        sums = decode(one, Natural(), segments, payloads[:n], 1.0, sums_for(server, [segments]))
        two = one.clone()
        assert sums is not None and sums.of(one, segments) is not None
        assert torch.equal(extracted(server, one, segments, KEY, sums), server.extract_(two, segments, KEY)) and same(one, two)
    one.mul_(1.0)
    assert sums.of(one, segments) is None, "somebody has written to it since"


def steps(method: Any, n: int, threads: int = 1) -> list[torch.Tensor]:
    """Rank 0's parameters and means after each of four steps of n ranks, in which the learning rate changes."""

    def worker(transport: Transport) -> list[torch.Tensor]:
        parameters, found = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in (("wide", (300, 250)), ("narrow", (3, 5)))}, []
        exchange = GradientExchange(parameters.items(), Compression(*method), transport, lr=0.1)
        random = torch.Generator().manual_seed(transport.rank)
        for lr in (0.1, 0.1, 0.05, 0.05):
            exchange.param_groups[0]["lr"] = lr
            gradients = {name: torch.randn(p.shape, generator=random) for name, p in parameters.items()}
            means = exchange.reduce(gradients)
            found += [t.detach().clone() for t in (*parameters.values(), *means.values())]
        return found

    torch.set_num_threads(threads)
    return run_simulated(n, worker)[0]


@contextmanager
def untold(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(Sums, "of", lambda self, buffer, segments: None)
        yield


METHODS = {
    "double_squeeze": (Sign(), MemSGD(), TwoPass()),
    "of pieces of another kind": (Sign("l2"), MemSGD(), TwoPass(Ternary("l1"))),
    "without feedback of the server": (Sign(), MemSGD(), TwoPass(server_feedback=False)),
    "skipping": (Sign(), MemSGD(), CompSkip(worker=Every(2), server=Every(2))),
}


@compiled
@pytest.mark.parametrize("name", METHODS)
def test_a_server_that_is_told_sums_sends_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is told is true: steps have the bits that they have where nobody is told anything; of 1, 2 and 3 servers, in two threads."""
    with native.forced(library):
        for n, threads in ((1, 1), (2, 1), (3, 2)):
            told = steps(METHODS[name], n, threads)
            with untold(monkeypatch):
                asked = steps(METHODS[name], n)
            assert told[-1].any() and all(same(a, b) for a, b in zip(told, asked, strict=True)), n


@compiled
@pytest.mark.parametrize("n", [1, 3])
def test_a_server_reads_its_residual_once(n: int) -> None:
    """All that double_squeeze extracts it extracts in one pass, and what it decodes it decodes by one call for each table. Controls: of entries that
    were chosen nothing is told; a server by blocks is not told anything."""
    counted = Counted()
    with native.forced(counted):
        steps(METHODS["double_squeeze"], n)
    calls = counted.calls
    assert calls["told"] == calls["sign_extract"] > 0
    served = calls["sign_decode"] - calls["sign_extract"] // (n + 1) * n  # each rank decodes the answers of n servers, and once what was sent to it
    assert served == calls["sign_extract"] // (n + 1), calls
    for method in ((TopK(4), MemSGD(), TwoPass(Sign())), (Sign(), MemSGD(), TwoPass(Sign("l1", 8)))):
        counted.calls.clear()
        with native.forced(counted):
            steps(method, 1)
        calls = counted.calls
        assert calls["sign_extract"] > 0 and calls["told"] < calls["sign_extract"], calls


@compiled
@pytest.mark.parametrize("compressor", [Sign(), Ternary("l1"), QSGD(), Natural()], ids=str)
def test_all_gathered_payloads_are_decoded_together(compressor: Any) -> None:
    """By each of three ranks, once in each of four steps for the one table."""
    counted = Counted()
    with native.forced(counted):
        steps((compressor, MemSGD(), AllGather()), 3)
    (name,) = (name for name in counted.calls if name.endswith("_decode"))
    extracts = next(count for called, count in counted.calls.items() if called.endswith("_extract"))
    assert counted.calls[name] == extracts, counted.calls


@dataclass(frozen=True)
class Doubled(Sign):
    """A user's own, which decodes in its own way."""

    def decode_(self, out: torch.Tensor, payload: torch.Tensor, segments: Segments, key: Key, alpha: float, *, add: bool) -> None:
        super().decode_(out, payload, segments, key, 2 * alpha, add=add)


def test_who_decodes_in_its_own_way_is_asked() -> None:
    segments = table([64], torch.float32)
    payloads = payloads_of(Sign(), segments, "gaussian", 2)
    left, right = (results(c, segments, payloads, torch.zeros(65))[0] for c in (Doubled(), Sign()))
    assert torch.equal(left, 2 * right) and right.any()


@compiled
def test_one_that_is_too_short_among_several_is_an_error() -> None:
    segments = table([640], torch.float32)
    (good, key), (bad, _) = payloads_of(Sign(), segments, "gaussian", 2)
    with native.forced(library), pytest.raises(Exception, match="one_bit: a payload has 80 elements"):
        decode_sum_(torch.zeros(640), Sign(), segments, [(good, key), (bad[:80], key)])
