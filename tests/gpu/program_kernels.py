"""The kernels for GPUs beside the reference on the CPU: selection, packing and random bits equal, sums near.   program_kernels.py DEVICE [NAME…]

With DEVICE cpu Triton's interpreter runs them (TRITON_INTERPRET=1 is set here, before Triton is imported). Prints RESULT and, as JSON, of each check
what differed: nothing, if all is well. `broken` is a control: checks of kernels that were made wrong, which must find it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__" and sys.argv[1] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from hvd_ecsgd.compressors import QSGD, Cast, Natural, RandomBlock, RandomK, Sign, Ternary, Threshold, TopK
from hvd_ecsgd.errors import CompressionError
from hvd_ecsgd.kernels import Addition, move_, native, shift_
from hvd_ecsgd.kernels.cuda import Cuda, tables
from hvd_ecsgd.protocols import Places
from hvd_ecsgd.segments import Key, Segments
from tests.unit.test_kernels import EXTREME, KINDS, same, values

CPU = torch.device("cpu")
KEY = Key(5, 7, 1, size=4)
SIZES = [0, 1, 70, 5000, 0, 333]
"""One is longer than a tile, and none is a multiple of it; empty ones first and between."""
EVERY = [
    Cast(), Cast(torch.bfloat16), Cast(saturate=True), Natural(), QSGD(norm="max"), QSGD(7, 16, "max"), QSGD(1, 5, "max"), QSGD(5, 7, "max"),
    TopK(100), TopK(3), TopK(1), TopK(k=5), RandomK(100), RandomK(1.5), RandomK(1), RandomK(5000), RandomBlock(3), RandomBlock(1),
    Threshold(100), Threshold(4), Threshold(1), Threshold(20, 0.9), Threshold(30, two_bits=True),
]  # fmt: skip
# What has sums is as exact but for these.
EVERY += [Sign(), Sign("l2"), Sign("l1", 8), Sign("l1", 5), Sign("l2", 5000), Ternary(), Ternary("l1"), QSGD(), QSGD(7), QSGD(1, 16)]


def table(sizes: list[int], dtype: torch.dtype, device: torch.device) -> Segments:
    return Segments.of([(f"layer{i}.weight", torch.empty(n, dtype=dtype, device=device)) for i, n in enumerate(sizes)])


class Side:
    """What one side makes of `v`: the reference on the CPU, or the kernels on a device."""

    def __init__(self, compressor: Any, sizes: list[int], dtype: torch.dtype, n: int, device: torch.device | None) -> None:
        self.compressor, self.on = compressor, device or CPU
        self.segments = table(sizes, dtype, self.on).piece(n - 1, n)
        self.kernels = None if device is None else Cuda

    def extracted(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rest = v.to(self.on, copy=True)
        with native.forced(self.kernels):
            payload = self.compressor.extract_(rest, self.segments, KEY)
        return rest.cpu(), payload.cpu()

    def decoded(self, v: torch.Tensor, payload: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for alpha in (1.0, 1 / 3):
            for add in (True, False):
                out = values("gaussian", v.numel(), v.dtype, 9).to(self.on)
                with native.forced(self.kernels):
                    self.compressor.decode_(out, payload.to(self.on), self.segments, KEY, alpha, add=add)
                found.append(out.cpu())
        return found


def differences(compressor: Any, kind: str, dtype: torch.dtype, n: int, device: torch.device) -> list[str]:
    """In what they differ from the reference, of a table (or its n-th piece) in a buffer that begins off a vector."""
    v = values(kind, sum(SIZES) + 1, dtype)[1:]
    ours, theirs = Side(compressor, SIZES, dtype, n, device), Side(compressor, SIZES, dtype, n, None)
    (rest, payload), (rest_, payload_) = ours.extracted(v), theirs.extracted(v)
    found = [f"sum {i}" for i, (a, b) in enumerate(zip(ours.decoded(v, payload_), theirs.decoded(v, payload_), strict=True)) if not same(a, b)]
    summing = isinstance(compressor, Sign | Ternary) or getattr(compressor, "norm", "") == "l2" or getattr(compressor, "two_bits", False)
    if not summing:
        return found + [what for what, a, b in (("payload", payload, payload_), ("rest", rest, rest_)) if not same(a, b)]
    if isinstance(compressor, Threshold):
        parts = [compressor._parts(p, theirs.segments) for p in (payload, payload_)]
        return found + [what for what, i in (("positions", 1), ("codes", 2)) if not torch.equal(parts[0][i], parts[1][i])]
    split = compressor._parts if isinstance(compressor, QSGD) else compressor._scales
    (scales, at), (scales_, _) = split(payload, theirs.segments), split(payload_, theirs.segments)
    squares = "l2" in (getattr(compressor, "scale", None), getattr(compressor, "norm", None))
    if not (squares and kind in EXTREME and dtype == torch.float32):  # where the reference's sum of squares leaves float32's range
        error = 2e-6 if dtype == torch.float32 else 1e-13
        near = ((scales - scales_).abs() <= error * scales.abs() + 2e-45) | (~scales.isfinite() & ~scales_.isfinite())
        codes = float((payload[at:] != payload_[at:]).double().mean()) if payload.numel() > at else 0.0
        found += [] if bool(near.all()) else ["scales"]
        found += [] if codes <= (0.01 if isinstance(compressor, QSGD) else 0.0) else ["codes"]
    if bool(scales.isfinite().all()):  # the rest is exactly what the payload, as it is, leaves
        decoded = torch.zeros_like(v)
        with native.forced(None):
            compressor.add_(decoded, payload, theirs.segments, KEY)
        found += [] if torch.equal((v - decoded).nan_to_num(), rest.nan_to_num()) else ["rest"]
    return found


def check_compressor(compressor: Any, device: torch.device, short: bool) -> list[str]:
    found = []
    for i, (kind, dtype) in enumerate(itertools.product(KINDS, (torch.float32, torch.float64))):
        if short and (i + 7 * EVERY.index(compressor)) % 20 not in (0, 11):
            continue
        n = (1, 3)[i // 2 % 2]
        found += [f"{kind}, {dtype}, piece {n}: {what}" for what in differences(compressor, kind, dtype, n, device)]
    return found


# -- the feedback rules' ------------------------------------------------------------------------------------------------------------------------

RULES: list[dict[str, Any]] = [
    {},
    {"carry": 0.5, "gradient": 0.1, "decay": 0.01},
    {"carry": 0.0, "gradient": 1.0},
    {"carry": 0.0, "gradient": 0.25, "decay": 0.125},
    {"momentum": True, "mu": 0.9},
    {"momentum": True, "mu": 0.9, "carry": 0.7, "gradient": 0.3, "decay": 0.05, "of_momentum": 0.2, "displacement": True},
    {"momentum": True, "mu": 0.0, "carry": 0.0, "gradient": 0.0, "of_momentum": 0.2},
]
KINDS_OF_GRADIENTS = [(torch.float32, k) for k in (torch.float32, torch.float16, torch.bfloat16)] + [(torch.float64, torch.float64)]
LAID = [(3, 5), (0,), (71, 70), (1,), (333,)]


def accumulated(rule: dict[str, Any], dtype: torch.dtype, kind: torch.dtype, spoil: float | None, device: torch.device | None) -> list[torch.Tensor]:
    """Whether all was finite, and the state afterwards; `spoil` is one gradient."""
    on = device or CPU
    named = [(f"p{i}", torch.empty(shape, dtype=dtype, device=on)) for i, shape in enumerate(LAID)]
    segments = Segments.of(named)
    at = iter(range(100))

    def flat() -> torch.Tensor:
        return values("gaussian", segments.numel, dtype, next(at)).to(on)

    e, m, d = flat(), flat(), flat()
    gradients, points = (
        [values("gaussian", t.numel(), kind, 20 + j + 10 * i).view(t.shape).to(on) for i, (_, t) in enumerate(named)] for j in (0, 1)
    )
    gradients[2] = gradients[2].t().contiguous().t()  # not in one piece
    if spoil is not None:
        gradients[2][70, 3] = spoil
    options = {**rule, "momentum": m if rule.get("momentum") else None, "displacement": d if rule.get("displacement") else None}
    with native.forced(None if device is None else Cuda):
        finite = Addition(segments, e, **options).add_(gradients, points)
    return [torch.tensor([bool(finite)]), e.cpu(), m.cpu(), d.cpu()]


def check_accumulate(device: torch.device, short: bool) -> list[str]:
    found = []
    for rule, (dtype, kind) in itertools.product(RULES, KINDS_OF_GRADIENTS):
        if short and rule not in RULES[4:6]:
            continue
        for spoil in (None, float("inf"), float("nan")) + ((1e6,) if kind != torch.float16 else ()):
            ours, theirs = (accumulated(rule, dtype, kind, spoil, on) for on in (device, None))
            undone = spoil is not None and spoil != 1e6
            near = 1e-5 if dtype == torch.float32 else 1e-13
            lost = undone and rule.get("mu") == 0.0  # a momentum of which nothing is left, nor of what it gave
            for name, a, b in zip(("finite", "e", "m", "d"), ours, theirs, strict=True):
                if not (torch.equal(a, b) or (undone and ((a.double() - b.double()).abs().max() <= near * 10 or (lost and name in "em")))) and not (
                    undone and rule.get("carry") == 0.0 and name == "e"
                ):
                    found.append(f"{rule}, {dtype}, {kind}, {spoil}: {name}")
    return found


def check_shift_and_move(device: torch.device, short: bool) -> list[str]:
    found = []
    for dtype in (torch.float32, torch.float64):
        results: list[list[torch.Tensor]] = []
        for on in (device, None):
            where = on or CPU
            segments = table(SIZES, dtype, where)
            x, t, update = (values("gaussian", segments.numel, dtype, i).to(where) for i in (1, 2, 3))
            parameters = [torch.zeros(n, dtype=dtype, device=where) for n in SIZES]
            versions = [p._version for p in parameters]
            with native.forced(None if on is None else Cuda):
                sums = shift_(parameters, segments, x, t, 0.3)
                counts = np.array([min(n, 7) for n in SIZES], np.int64)
                positions = torch.cat([torch.arange(c, dtype=torch.int32) * (n // max(c, 1)) for c, n in zip(counts.tolist(), SIZES)]).to(where)
                move_(parameters, update, segments, Places(counts, positions))
            found += [] if all(p._version > v for p, v in zip(parameters, versions) if p.numel()) else [f"{dtype}: versions"]
            results.append([t.cpu() for t in (*parameters, update, *sums)])
        found += [f"{dtype}: {i}" for i, (a, b) in enumerate(zip(*results, strict=True)) if not torch.equal(a, b)]
    return found


def check_damage(device: torch.device, short: bool) -> list[str]:
    """Payloads whose positions do not ascend within their segment are an error that names the parameter, and change nothing."""
    found = []
    for wrong in (-1, 5000, 10**9, 0):
        segments = table(SIZES, torch.float32, device)
        v = values("gaussian", segments.numel, torch.float32).to(device)
        with native.forced(Cuda):
            compressor = TopK(k=5)
            payload = compressor.extract_(v, segments, KEY)
            positions = compressor._parts(payload, segments)[1]
            positions[1 + 5 + 2] = wrong  # the third of the fourth segment
            out = torch.ones_like(v)
            try:
                compressor.assign_(out, payload, segments, KEY)
                found.append(f"{wrong}: no error")
            except CompressionError as error:
                found += [] if "layer3.weight" in str(error) else [f"{wrong}: {error}"]
        found += [] if bool((out == 1).all()) else [f"{wrong}: something was decoded"]
    return found


def check_long(device: torch.device, short: bool) -> list[str]:
    """Many tiles, and two programs that go through theirs in a loop; and more segments than any other check has."""
    found = []
    for sizes in ([tables.ROWS + 5001, 7], [3] * 40):
        for compressor in (TopK(50),) if short else (TopK(50), Sign(), RandomK(64), Threshold(100)):
            for kind in ("constant",) if short else ("gaussian", "constant"):
                with swapped(sys.modules[__name__], "SIZES", sizes):
                    found += [f"{compressor}, {kind}, {len(sizes)}: {what}" for what in differences(compressor, kind, torch.float32, 1, device)]
    return found


CHECKS: dict[str, Callable[[torch.device, bool], list[str]]] = {
    **{str(c): (lambda device, short, c=c: check_compressor(c, device, short)) for c in EVERY},  # type: ignore[misc]
    "accumulate": check_accumulate,
    "shift and move": check_shift_and_move,
    "damaged positions": check_damage,
    "long": check_long,
}

LEFT_OUT = [str(c) for c in (TopK(100), TopK(1), TopK(k=5), RandomK(5000), RandomBlock(1), Threshold(100), Threshold(1),
            Threshold(20, 0.9), Sign("l1", 8), Sign("l2", 5000), Ternary("l1"), QSGD(7), QSGD(1, 16), QSGD(norm="max"))]  # fmt: skip
"""With --short."""


def broken(device: torch.device) -> dict[str, list[str]]:
    """Control: kernels that are wrong in a little are found to be."""
    from hvd_ecsgd.kernels import reference

    found = {}
    with swapped(tables, "tiles_of", lambda *given, **named: tables_before(*given, **named)[:-1]):
        found["the last tile is left out"] = differences(Natural(), "gaussian", torch.float32, 1, device)
    with swapped(reference, "_WEYL", (0x9E3779B9, 0xBB67AE87)):
        found["another random stream"] = differences(QSGD(7, 16, "max"), "gaussian", torch.float32, 1, device)
    with swapped(Cuda, "_kth_largest", lambda self, *given: tuple(t - i for i, t in enumerate(kth_before(self, *given)))):
        found["one of the ties is left out"] = differences(TopK(3), "ties", torch.float32, 1, device)
    with swapped(Cuda, "_number", lambda self, value: torch.full((1,), value * (1 + 2**-23), dtype=torch.float64, device=self._device)):
        found["a factor is off by its last bit"] = differences(Sign(), "gaussian", torch.float32, 1, device)
    return found


tables_before, kth_before = tables.tiles_of, Cuda._kth_largest


@contextlib.contextmanager
def swapped(where: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


def round_once() -> None:
    """Triton's interpreter multiplies and adds in two roundings, where its language (and a GPU) has one."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        a, b, c = (t.data for t in (x, y, z))
        if a.dtype == np.float32:
            return TensorHandle((a.astype(np.float64) * b + c).astype(np.float32), z.dtype)
        # Error-free transformations (Dekker, Knuth): the product's and the sum's errors are added to the sum.
        product, big = a * b, 134217729.0
        split = [(t * big - (t * big - t)) for t in (a, b)]
        (ah, bh), (al, bl) = split, (a - split[0], b - split[1])
        error = ((ah * bh - product) + ah * bl + al * bh) + al * bl
        total = product + c
        part = total - product
        rest = (product - (total - part)) + (c - part) + error
        return TensorHandle(np.where(np.isfinite(rest), total + rest, total), z.dtype)

    InterpreterBuilder.create_fma = create_fma


def main() -> None:
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    device = torch.device(sys.argv[1])
    names, short = [a for a in sys.argv[2:] if a != "--short"], "--short" in sys.argv
    if device.type == "cpu":
        round_once()
    else:
        device = torch.device("cuda", torch.cuda.current_device())
    found: dict[str, Any] = {}
    for name in names or [*(n for n in CHECKS if not short or n not in LEFT_OUT), "broken"]:
        try:
            found[name] = broken(device) if name == "broken" else CHECKS[name](device, short)
        except Exception as error:
            import traceback

            found[name] = [f"{error!r}"[:500] + traceback.format_exc()[-1500:]]
    print(f"RESULT {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
