"""Each kernel as a fraction of the bandwidth that a copy has, whole steps in units of T (one `e.add_(g)`), and rivals, in one process on one GPU.

    python benchmarks/gpu.py [--device cuda] [--numel 100000000,1000000000] [--repeat 9] [--seconds 150] [--output NAME.json] [--short]

`of copy`: the bytes that a kernel must move at least (what it reads and writes once, payload included) by its time, as a share of the measured
bandwidth of a copy; a kernel that reads its input twice cannot reach 1. Times are of CUDA events, medians with quartiles in JSON. Sizes are halved
until they fit into the memory. `--device cpu`: whether it runs, with the CPU's kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import kernels as steps
from hvd_ecsgd import Compression
from hvd_ecsgd.compressors import QSGD, Natural, RandomBlock, Sign
from hvd_ecsgd.exchange import AllReduce
from hvd_ecsgd.feedback import MemSGD
from hvd_ecsgd.kernels import kernels_for
from hvd_ecsgd.segments import Key, Segments

SPARSE = "random_block, sparse"
"""Of which the update is applied where alone it is not zero."""
steps.METHODS[SPARSE] = lambda: Compression(RandomBlock(64), MemSGD(), AllReduce())
STEPS = ("random_block", SPARSE, "detached", "one_bit", "top_k", "qsgd 4 bits", "threshold", "natural", "bf16", "power_sgd 4")
TARGETS = {"random_block": 1.4, SPARSE: 1.1, "detached": 3.0, "one_bit": 2.2, "top_k": 3.0, "qsgd 4 bits": 3.0}
BUFFERS = 10
"""Of the gradient's size, which a run may need at once."""


def fitting(numel: int, device: torch.device) -> int:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 32
    while 4 * BUFFERS * numel > free:
        numel //= 2
    return numel


def loops(numel: int, device: torch.device) -> dict[str, tuple[float, Callable[[], object]]]:
    """By kernel: bytes for each element, and a call over one segment of so many float32; e and the payloads are used again and again."""
    generator = torch.Generator(device=device).manual_seed(0)
    e, g = (torch.randn(numel, device=device, dtype=torch.float32, generator=generator) for _ in range(2))
    segments = Segments.of([("w", e)])
    kernel: Any = kernels_for(e, segments, "bench")
    payload = torch.zeros(2 * numel + 4 * (numel // 512 + 2), dtype=torch.uint8, device=device)
    half = torch.empty(numel, dtype=torch.bfloat16, device=device)
    k = max(1, numel // 100)
    counts = np.array([k], np.int64)
    positions, values = torch.empty(k, dtype=torch.int32, device=device), torch.empty(k, dtype=torch.float32, device=device)
    spread = torch.arange(k, dtype=torch.int32, device=device) * 100
    sampled, ranks = np.array([k], np.int64), np.array([max(1, k // 100)], np.int64)
    factors = np.array([1.0, 1.0, 0.0, 0.0, 1.0])

    def decode(compressor: Any) -> None:
        compressor.assign_(e, payload, segments, Key(0, 0))

    def threshold() -> None:
        found, write = kernel.threshold([1], sampled, ranks, take=False)
        write(torch.empty(int(found.sum()), dtype=torch.int32, device=device), None)

    return {
        "e.add_(g)": (12, lambda: e.add_(g)),
        "accumulate": (12, lambda: kernel.accumulate_(None, None, [g], None, factors)),
        "shift": (12, lambda: kernel.shift_([g], e, -0.01)),
        "sign: extract": (8.125, lambda: kernel.sign_extract_(payload, False, None)),
        "sign: decode": (4.125, lambda: decode(Sign())),
        "ternary: extract": (8.25, lambda: kernel.ternary_extract_(payload, False)),
        "qsgd 4 bits: extract": (8.5, lambda: kernel.qsgd_extract_(payload, [1], 7, 512, 4, False)),
        "qsgd 4 bits: decode": (4.5, lambda: decode(QSGD(7))),
        "natural: extract": (9.125, lambda: kernel.natural_extract_(payload, [1])),
        "natural: decode": (5.125, lambda: decode(Natural())),
        "cast: extract": (10, lambda: kernel.cast_extract_(half, float("inf"))),
        "cast: decode": (6, lambda: kernel.cast_decode_(half, 1.0, False)),
        "top_k 1 %: extract": (4.16, lambda: kernel.top_k(counts, positions, values)),
        "threshold 1 %: positions": (4.04, threshold),
        "random_k 1 %: positions": (0.04, lambda: kernel.random_k([1], counts)),
        "1 %: take": (0.12, lambda: kernel.take_(counts, spread, values)),
        "1 %: add": (0.16, lambda: kernel.decode_at_(counts, spread, values, 1.0, True)),
        "torch.topk 1 %": (4.12, lambda: torch.topk(g.abs(), k, sorted=False)),
        "torch: bf16 and back": (12, lambda: e.copy_(half.copy_(g))),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu")
    parser.add_argument("--numel", default="100000000,1000000000", help="sizes, with commas between")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=150.0, help="after which nothing more is begun")
    parser.add_argument("--output", type=Path, help="the JSON file")
    parser.add_argument("--short", action="store_true", help="a small size and two runs: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    device, end = torch.device(given.device), time.monotonic() + given.seconds
    if given.short:
        given.numel, given.repeat = "50000", 2
    found: dict[str, Any] = {"device": given.device, "torch": torch.__version__, "sizes": {}, "left out": []}
    for wanted in [int(n) for n in given.numel.split(",")]:
        numel = fitting(wanted, device)
        size: dict[str, Any] = {"wanted": wanted, "kernels": {}, "steps": {}}
        found["sizes"][str(numel)] = size
        a, b = (torch.zeros(numel, dtype=torch.float32, device=device) for _ in range(2))
        copy = steps.spread([steps.timed(lambda b=b, a=a: b.copy_(a), device) for _ in range(given.repeat + 2)][2:])
        size["copy"] = {**copy, "GB/s": (rate := 8 * numel / copy["median"]) / 1e9}
        del a, b
        print(f"\n{numel / 1e6:g} M float32, a copy: {rate / 1e9:.0f} GB/s\n{'kernel':28}{'ms':>9}{'GB/s':>8}{'of copy':>9}")
        for name, (n_bytes, call) in loops(numel, device).items():
            if time.monotonic() > end:
                found["left out"].append(f"{numel}: {name}")
                continue
            times = steps.spread([steps.timed(call, device) for _ in range(given.repeat + 1)][1:])  # the first compiles
            speed = n_bytes * numel / times["median"]
            size["kernels"][name] = {**times, "bytes an element": n_bytes, "GB/s": speed / 1e9, "of copy": speed / rate}
            print(f"{name:28}{1e3 * times['median']:9.3f}{speed / 1e9:8.0f}{speed / rate:9.1%}", flush=True)
        del call
        print(f"\n{'whole step':28}{'T':>9}{'target':>8}{'of copy':>9}")
        for name in STEPS:
            if time.monotonic() > end:
                found["left out"].append(f"{numel}: {name}")
                continue
            row = steps.measure(name, numel, given.repeat, device, "normal", reference=False)
            kind = "native" if "native" in row["T"] else "reference"
            size["steps"][name] = {
                "in T": row["T"][kind],
                "target": TARGETS.get(name),
                "of copy": row["of copy"][kind],
                "seconds": row["seconds"][kind],
            }
            print(f"{name:28}{row['T'][kind]:9.2f}{TARGETS.get(name, ''):>8}{row['of copy'][kind]:9.1%}", flush=True)
    for left in found["left out"]:
        print(f"left out, as the time was over: {left}")
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
