"""What a whole step of each method costs in one process: native kernels beside the reference, in units of T, the time of one `e.add_(g)`.

    python benchmarks/kernels.py [--numel 25000000] [--threads 1] [--repeat 9] [--device cpu] [--only top_k,one_bit]
        [--distribution normal] [--output NAME] [--short] [--passes] [--distributions] [--gain] [--layers 10]

A step is accumulate, extract, send to oneself and decode, through `GradientExchange`, as a training loop of one's own calls it. Native and reference
steps, and T, take turns, so that what else the machine does meets all of them alike; given are the median, and in JSON the quartiles and the least.
GB/s is the gradient's bytes by time, beside those of a copy. `of copy`: the three accesses of e += g, which every step makes at least, by the step's
time, as a share of the bandwidth that a copy was measured to have. `--device cuda`: on a GPU, with Triton's kernels as native; times are
of its events. `--passes`: in place of times of whole steps, the passes over memory that one step makes (CPU): of each kernel and each operation of
torch how often, the streams (reads and writes of gradient size; T has three) and its time in T, in the thread's own seconds, which other work
disturbs less. What is read again while a cache holds it counts once. `--distributions`: of steps over heavy-tailed, constant, sparse and denormal
gradients, over ties and over zeros, how many times as long they take as those over normal ones. `--gain`: how many times as fast a step is in
--threads as in one. Both with the compiled kernels, of the least times, as other work only adds to them, and all take turns. `--output NAME` writes
NAME.json, and NAME.png where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvd_ecsgd import Compression, GradientExchange
from hvd_ecsgd.compressors import Natural, RandomBlock, Ternary
from hvd_ecsgd.exchange import AllReduce
from hvd_ecsgd.feedback import MemSGD
from hvd_ecsgd.kernels import cuda, native
from hvd_ecsgd.kernels.library import FILE, Library

METHODS: dict[str, Callable[[], Any]] = {
    "random_block": lambda: Compression.random_block(64),
    "detached": lambda: Compression.detached(64),
    "one_bit": lambda: Compression.one_bit(),
    "fp16": lambda: Compression.fp16(error_feedback=True),
    "fp16 without feedback": lambda: Compression.fp16(),
    "bf16": lambda: Compression.bf16(error_feedback=True),
    "random_k": lambda: Compression.random_k(100),
    "threshold": lambda: Compression.threshold(100),
    "double_squeeze": lambda: Compression.double_squeeze(),
    "top_k by block": lambda: Compression.top_k(100, block=512),
    "power_sgd": lambda: Compression.power_sgd(1),
    "power_sgd 4": lambda: Compression.power_sgd(4),
    "ternary": lambda: Compression.ternary(),
    "ternary double_squeeze": lambda: Compression.double_squeeze(Ternary("l1")),
    "qsgd": lambda: Compression.qsgd(),
    "qsgd 4 bits": lambda: Compression.qsgd(7),
    "natural": lambda: Compression.natural(error_feedback=True),
    "natural double_squeeze": lambda: Compression.double_squeeze(Natural()),
    "top_k": lambda: Compression.top_k(100),
    "random_block applied": lambda: Compression(RandomBlock(64), MemSGD(), AllReduce()),
    "top_k applied": lambda: Compression.topk_sgd(100),
}
"""`applied`: the method moves the parameters itself, where something has come, and no gradient becomes the mean."""
TARGETS = {
    "random_block": 1.45, "detached": 3.0, "one_bit": 2.0, "fp16": 2.0, "bf16": 2.0, "random_k": 1.8, "threshold": 2.3, "double_squeeze": 4.0,
    "top_k by block": 3.0, "power_sgd": 4.0, "ternary": 2.6, "qsgd": 4.0, "qsgd 4 bits": 4.0, "natural": 4.0, "top_k": 2.5,
    "random_block applied": 1.1, "top_k applied": 1.5,
}  # fmt: skip
"""In T, one thread, of a step over 25 M normal float32."""

DISTRIBUTIONS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "normal": lambda g, _: g,
    "heavy-tailed": lambda g, _: g**5,
    "constant": lambda g, _: torch.full_like(g, -0.75),
    "sparse": lambda g, random: g * (torch.rand(g.shape, generator=random) < 0.01),
    "denormal": lambda g, _: g * 1e-40,
    "ties": lambda g, _: g.round(),
    "zeros": lambda g, _: torch.zeros_like(g),
}
LAYERS = 10
QUARTERS = 4


def timed(f: Callable[[], object], device: torch.device) -> float:
    """In seconds; on a GPU between two of its events."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        f()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


STREAMS: dict[str, Callable[[tuple[Any, ...]], float]] = {
    "accumulate": lambda a: 3 + 2 * bool(a[4]) + 2 * bool(a[5]) + bool(a[9]) - (ctypes.c_double.from_address(a[10]).value == 0),
    "sign_extract": lambda a: 2 if a[7] else 3,
    "sign_decode": lambda a: 2 if a[7] else 1,
    "ternary_extract": lambda a: 2 if a[6] else 3,
    "ternary_decode": lambda a: 2 if a[7] else 1,
    "cast_extract": lambda a: 2,
    "cast_extract_from": lambda a: 1,
    "cast_decode": lambda a: 2 if a[7] else 1,
    "natural_extract": lambda a: 2,
    "natural_decode": lambda a: 2 if a[7] else 1,
    "qsgd_extract": lambda a: 2,
    "qsgd_extract_from": lambda a: 1,
    "qsgd_decode": lambda a: 2 if a[7] else 1,
    "positions_decode": lambda a: 0 if a[8] else 1,
    "top_k": lambda a: 1,
    "threshold_choose": lambda a: 1,
    "block_top_k_extract": lambda a: 1,
    "block_top_k_decode": lambda a: 0 if a[9] else 1,
    "shift": lambda a: 3 if a[4] else 1,
    "low_rank_p": lambda a: 1,
    "low_rank_q": lambda a: 1,
    "low_rank_decode": lambda a: 3 if a[8] else 1,
}
"""Of a kernel that is called with these arguments, over its table: what it reads and writes of the buffers' size. Payloads come beside."""


class Passes(TorchDispatchMode):
    """Passes over memory of one step over `numel` elements, by name: [calls, streams, seconds of this thread]."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.seen = numel, defaultdict[str, list[float]](lambda: [0, 0.0, 0.0])
        passes = self

        class Watched(Library):
            def call(self, name: str, *arguments: Any) -> int:
                start = time.thread_time()
                result = super().call(name, *arguments)
                seconds, streams = time.thread_time() - start, STREAMS.get(name)
                of = arguments[1:3] if name.endswith("_extract_from") else arguments[2:4]  # which have no buffer
                passes.add(name, streams(arguments) * _elements(of) if streams else 0.0, seconds)
                return result

        self.library = Watched(FILE)

    def add(self, name: str, elements: float, seconds: float) -> None:
        row = self.seen[name]
        row[0], row[1], row[2] = row[0] + 1, row[1] + elements / self.numel, row[2] + seconds

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        result = operation(*args, **(kwargs or {}))
        seconds, views = time.thread_time() - start, operation.is_view
        if not views:
            given = {t.data_ptr(): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
            written = 1 if operation._schema.is_mutable and "zero_" not in str(operation) and "copy_" not in str(operation) else 0
            elements = sum(t.nbytes for t in given.values()) / 4 + written * max((t.nbytes for t in given.values()), default=0) / 4
            if elements >= self.numel / 1000:
                self.add(str(operation).removeprefix("aten."), elements, seconds)
        return result


def _elements(table: tuple[int, int]) -> int:
    """Of a table of segments, as kernels take it."""
    address, n = table
    return sum((ctypes.c_int64 * (2 * n)).from_address(address)[1::2]) if n else 0


def passes(name: str, numel: int, layers: int, repeat: int) -> None:
    """Print those of a method's steps; the medians of times."""
    gradients, _ = normal(numel, layers, torch.device("cpu"))
    flat, other = (torch.zeros(sum(g.numel() for g in gradients)) for _ in range(2))
    found: list[Passes] = []
    step, ones = Stepper(METHODS[name](), gradients, None), []
    for i in range(repeat + 3):
        start = time.thread_time()
        flat.add_(other)
        ones.append(time.thread_time() - start)
        watched = Passes(flat.numel())
        step.kernels = watched.library
        with watched:
            step()
        if i >= 3:  # what guards a step looks at more in the first ones
            found.append(watched)
    one = statistics.median(ones)
    rows = {key: (*found[-1].seen[key][:2], statistics.median(f.seen[key][2] for f in found) / one) for key in found[-1].seen}
    streams, total = (sum(row[i] for row in rows.values()) for i in (1, 2))
    print(f"{name}: {streams:.1f} streams, which are {streams / 3:.2f} T; {total:.2f} T in them", flush=True)
    for key, (calls, n, t) in sorted(rows.items(), key=lambda pair: -pair[1][2]):
        if t >= 0.02 or n >= 0.05:
            print(f"    {key:28}{calls:5.0f} calls{n:8.2f} streams{t:8.2f} T", flush=True)


def compiled(device: torch.device) -> Any:
    """The kernels for the device; None where there are none."""
    if device.type == "cuda":
        return cuda.Cuda if cuda.available() else None
    return native.native_library()


def spread(times: list[float]) -> dict[str, float]:
    """Least, quartiles and median, in seconds."""
    low, middle, high = statistics.quantiles(times, n=QUARTERS, method="inclusive") if len(times) > 1 else times * 3
    return {"least": min(times), "first quartile": low, "median": middle, "third quartile": high}


class Stepper:
    """One method over the model; a call is one step."""

    def __init__(self, method: Any, gradients: list[torch.Tensor], kernels: Any) -> None:
        self._gradients, self.kernels = {f"layer{i}.weight": g for i, g in enumerate(gradients)}, kernels
        parameters = [(name, torch.nn.Parameter(torch.zeros_like(g))) for name, g in self._gradients.items()]
        options = {"lr": 0.01} if method.method.feedback.takes.learning_rate else {}
        self.exchange = GradientExchange(parameters, method, **options)
        self.means: dict[str, torch.Tensor] = {}

    def __call__(self) -> None:
        self.means = {}
        with native.forced(self.kernels):
            self.means = self.exchange.reduce(self._gradients)

    def error(self) -> float | None:
        """‖mean − gradient‖ / ‖gradient‖ of the last step; None where the method applies the update itself."""
        if not self.means:
            return None
        wrong = sum(float((self.means[name] - g).square().sum()) for name, g in self._gradients.items())
        of = sum(float(g.square().sum()) for g in self._gradients.values())
        return (wrong / of) ** 0.5 if of else 0.0


def measure(
    name: str, numel: int, repeat: int, device: torch.device, distribution: str, reference: bool = True, layers: int = LAYERS
) -> dict[str, Any]:
    """A row of the table: times of native and reference (`reference` False: only where there is no native), of T and of a copy."""
    gradients, generator = normal(numel, layers, device)
    gradients = [DISTRIBUTIONS[distribution](g, generator) for g in gradients]
    flat, other = (torch.zeros(sum(g.numel() for g in gradients), device=device) for _ in range(2))
    library = compiled(device)
    kinds = {**({"native": library} if library else {}), **({"reference": None} if reference or not library else {})}
    steppers = {kind: Stepper(METHODS[name](), gradients, library) for kind, library in kinds.items()}
    times: dict[str, list[float]] = {kind: [] for kind in (*steppers, "T", "copy")}
    for i in range(repeat + 1):
        round_of = {"T": timed(lambda: flat.add_(other), device), "copy": timed(lambda: other.copy_(flat), device)}
        round_of |= {kind: timed(step, device) for kind, step in steppers.items()}
        for kind, seconds in round_of.items() if i else ():  # the first step allocates
            times[kind].append(seconds)
    step = steppers.get("native") or steppers["reference"]
    one = statistics.median(times["T"])
    n_bytes = flat.nbytes
    row: dict[str, Any] = {"method": name, "seconds": {kind: spread(t) for kind, t in times.items()}, "error": step.error()}
    row["T"] = {kind: statistics.median(t) / one for kind, t in times.items()}
    row["target"] = TARGETS.get(name)
    row["GB/s"] = {kind: n_bytes / statistics.median(t) / 1e9 for kind, t in times.items()}
    copy = 2 / statistics.median(times["copy"])
    row["of copy"] = {kind: 3 / statistics.median(times[kind]) / copy for kind in steppers}
    row["bytes"] = step.exchange.compression.traffic.payload // (repeat + 1)
    return row


def normal(numel: int, layers: int, device: torch.device) -> tuple[list[torch.Tensor], torch.Generator]:
    """Square gradients of `layers` layers, about `numel` elements in all, always the same ones; and what draws more."""
    side = max(2, int((numel / layers) ** 0.5))
    generator = torch.Generator(device=device).manual_seed(0)
    return [torch.randn(side, side, device=device, generator=generator) for _ in range(layers)], generator


def least(steps: dict[str, Callable[[], object]], repeat: int, device: torch.device) -> dict[str, float]:
    """The least seconds of each; they take turns."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for i in range(repeat + 1):
        for kind, step in steps.items():
            seconds = timed(step, device)
            if i:  # the first step allocates
                times[kind].append(seconds)
    return {kind: min(of) for kind, of in times.items()}


def ratios(name: str, numel: int, layers: int, repeat: int, device: torch.device) -> dict[str, float]:
    """By distribution of the gradients: the time of a step, as a multiple of that over normal ones."""
    steps: dict[str, Callable[[], object]] = {}
    for kind, made in DISTRIBUTIONS.items():
        gradients, generator = normal(numel, layers, device)
        steps[kind] = Stepper(METHODS[name](), [made(g, generator) for g in gradients], compiled(device))
    found = least(steps, repeat, device)
    return {kind: seconds / found["normal"] for kind, seconds in found.items() if kind != "normal"}


def gain(name: str, numel: int, layers: int, repeat: int, threads: int) -> float:
    """How many times as fast a step is in `threads` as in one."""
    gradients, _ = normal(numel, layers, torch.device("cpu"))
    step = Stepper(METHODS[name](), gradients, native.native_library())

    def in_threads(n: int) -> Callable[[], object]:
        def run() -> None:
            torch.set_num_threads(n)
            step()

        return run

    found = least({"one": in_threads(1), "more": in_threads(threads)}, repeat, torch.device("cpu"))
    return found["one"] / found["more"]


def plotted(rows: list[dict[str, Any]], path: Path) -> bool:
    """A bar for each method and kind; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.5))
    for shift, kind in ((-0.2, "native"), (0.2, "reference")):
        axes.barh([i + shift for i in range(len(rows))], [row["T"].get(kind, 0.0) for row in rows], 0.4, label=kind)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("whole step, in passes e += g")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--layers", type=int, default=LAYERS, help="that these elements are in")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--distribution", choices=list(DISTRIBUTIONS), default="normal", help="of the gradients")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--only", default="", help=f"some of {', '.join(METHODS)}, with commas between")
    parser.add_argument("--output", type=Path, help="where to write NAME.json and NAME.png")
    parser.add_argument("--passes", action="store_true", help="what a step reads and writes, pass by pass, with the compiled kernels")
    parser.add_argument("--distributions", action="store_true", help="how much longer steps over other than normal gradients take (aim: at most 2)")
    parser.add_argument("--gain", action="store_true", help="how many times as fast a step is in --threads as in one (CPU)")
    parser.add_argument("--short", action="store_true", help="a small model and two steps: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    if given.short:
        given.numel, given.repeat = 20_000, 2
    chosen = given.only.split(",") if given.only else list(METHODS)
    if unknown := [name for name in chosen if name not in METHODS]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(METHODS)}")
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    if given.passes:
        if device.type != "cpu" or compiled(device) is None:
            parser.error("--passes counts those of the compiled kernels on the CPU")
        for name in chosen:
            passes(name, given.numel, given.layers, given.repeat)
        return
    if given.distributions:
        others = [kind for kind in DISTRIBUTIONS if kind != "normal"]
        print(f"{'÷ normal':24}" + "".join(f"{kind:>14}" for kind in others))
        for name in chosen:
            found = ratios(name, given.numel, given.layers, given.repeat, device)
            print(f"{name:24}" + "".join(f"{found[kind]:14.2f}" for kind in others), flush=True)
        return
    if given.gain:
        if device.type != "cpu" or compiled(device) is None or given.threads < 2:
            parser.error("--gain is of the compiled kernels on the CPU, and needs --threads 2 or more")
        for name in chosen:
            print(f"{name:24}{gain(name, given.numel, given.layers, given.repeat, given.threads):6.2f} ×", flush=True)
        return
    library = compiled(device)
    variant = "Triton" if library is cuda.Cuda else library.variant if library else None
    where = "" if device.type == "cpu" else f" on {given.device}"
    print(f"{given.numel / 1e6:g} M float32{where}, {given.threads} thread(s), kernels: {variant or 'reference only'}")
    print(f"{'method':24}{'native':>9}{'target':>8}{'reference':>11}{'copy':>7}  T   {'GB/s':>6}{'copy':>6}{'of copy':>9}{'error':>8}{'bytes':>12}")
    rows = []
    for name in chosen:
        rows.append(row := measure(name, given.numel, given.repeat, device, given.distribution, layers=given.layers))
        ours, speed = row["T"].get("native", float("nan")), row["GB/s"].get("native", row["GB/s"]["reference"])
        error = "" if row["error"] is None else f"{row['error']:.3f}"
        print(
            f"{name:24}{ours:9.2f}{row['target'] or '':>8}"
            f"{row['T']['reference']:11.2f}{row['T']['copy']:7.2f}      {speed:6.2f}{row['GB/s']['copy']:6.2f}"
            f"{row['of copy'].get('native', row['of copy']['reference']):9.1%}{error:>8}{row['bytes']:12}",
            flush=True,
        )
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "numel": given.numel,
            "device": given.device,
            "distribution": given.distribution,
            "threads": given.threads,
            "variant": variant,
            "torch": torch.__version__,
        }
        given.output.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1))
        if not plotted(rows, given.output.with_suffix(".png")):
            print("no plot, as matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    main()
