"""Writes down what compression does in each step."""

from __future__ import annotations

import time
import warnings
from types import TracebackType
from typing import Any, Literal

from ..arguments import check_integer
from ..core.bound import BoundCompression
from ..core.meter import Measured, Meter
from ..core.method import Method
from ..core.state import MethodState
from ..errors import CompressionError
from ..version import __version__
from .health import Health
from .sinks import JsonLines, sink_of

__all__ = ["FORMAT", "Logger"]

FORMAT = 1
"""Of the lines; a later one adds names, and changes none."""


class Logger:
    """Measures `compression`, bound, from the next step on, and gives a record of each step that is over to every one of `sinks`.

        logger = telemetry.Logger(compression, "run.jsonl")        # or more sinks: a tqdm bar, telemetry.TensorBoard(folder), …

    A sink is the name of a file of JSON lines, which is added to; a tqdm bar; a SummaryWriter; or what has write(record) and close(). Without any,
    `compression.metrics()["last"]` alone has the numbers. `every`: steps that one record covers, whose bytes and seconds are added up. `norms_every`:
    in every so many-th step norms are taken, at three passes over the gradients; 0: never. `ranks`: "first" measures rank 0 alone, "all" each
    rank, into a file of its own. Nothing is sent, and results are the same to the bit.

    What is worth a warning is warned of once (`RuntimeWarning`) and goes to the sinks, too. A sink that fails in mid-training is warned of and left
    out from then on. Works on every driver, and may be made before or after the optimizer; an AsyncDistributedOptimizer or a
    CutoffDistributedOptimizer is given in place of a compression. `close()`, or the end of a `with`, ends it.
    Raises `CompressionError` where the compression is not bound or is measured already, and for sinks as each says.
    """

    def __init__(
        self,
        compression: Measured,
        *sinks: Any,
        every: int = 1,
        norms_every: int = 50,
        ranks: Literal["first", "all"] = "first",
    ) -> None:
        if not isinstance(compression, Measured) or isinstance(compression, type):
            raise CompressionError(
                "Logger: expected a bound compression, Compression.….bind(model) or what optimizer.compression is, or an "
                f"AsyncDistributedOptimizer or a CutoffDistributedOptimizer, got {compression!r:.100}."
            )
        check_integer(every, "every", "a number of steps, at least 1", least=1)
        check_integer(norms_every, "norms_every", "a number of steps, or 0 for never", least=0)
        if ranks not in ("first", "all"):
            raise CompressionError(f"Logger: ranks must be 'first' or 'all', got {ranks!r}.")
        self._sinks = [sink_of(sink) for sink in sinks]
        self._compression: Measured | None = compression
        self._settings = {"every": every, "norms_every": norms_every}
        self._method: Method | None = None
        self._health = Health()
        self._meter = Meter(
            self._write,
            every=every,
            norms_every=norms_every,
            group_of=compression.attached.group_of if isinstance(compression, BoundCompression) else lambda bucket: bucket.group,
            wanted=(lambda rank: True) if ranks == "all" else (lambda rank: rank == 0),
        )
        compression.measure_by(self._meter)

    def _write(self, state: MethodState, record: dict[str, Any]) -> None:
        place = {"rank": state.process}
        if state.method is not self._method:
            self._tell({"kind": "run" if self._method is None else "method", **place, "step": record["step"], **self._about(state)})
            self._method = state.method
        self._tell({"kind": "step", **place, **record})
        for text in self._health.look(state.method, state.size, record):
            warnings.warn(f"step {record['step']}: {text}", RuntimeWarning, stacklevel=2)
            self._tell({"kind": "warning", **place, "step": record["step"], "text": text})

    def _about(self, state: MethodState) -> dict[str, Any]:
        compressed = sum(b.segments.numel for b in state.buckets if not b.dense)
        return {
            "format": FORMAT,
            "version": __version__,
            "method": repr(state.method),
            **{part: repr(getattr(state.method, part)) for part in ("compressor", "feedback", "exchange")},
            "unit": state.method.feedback.unit,
            "size": state.size,
            "parameters": sum(p.numel() for _, p in state.named),
            "compressed_parameters": compressed,
            "unix_seconds": round(time.time(), 3),
            **self._settings,
        }

    def _tell(self, line: dict[str, Any]) -> None:
        for sink in list(self._sinks):
            try:
                sink.write(line)
            except Exception as error:
                self._sinks.remove(sink)
                warnings.warn(
                    f"Logger: {sink if isinstance(sink, JsonLines) else type(sink).__name__} failed ({type(error).__name__}: {error}) and gets no "
                    "more records; training goes on.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def close(self) -> None:
        """Measure no more, and close the sinks. Nothing when that is done already."""
        if self._compression is not None:
            self._compression.measure_by(None)  # before, as another thread may take steps
            self._meter.flush()
            self._compression = None
            for sink in self._sinks:
                sink.close()

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
