"""The host waits for a GPU once in a step, but where an exchange needs a size or a server must know: counted on one that is pretended."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch

from hvd_ecsgd import GradientExchange
from hvd_ecsgd.protocols import NO_SEGMENTS
from hvd_ecsgd.transport import SelfTransport
from tests.cases import CASES, Case, bound_method, ids
from tests.pretend import kernels_that_write_zeros, on_gpu

SHAPES = {"a.weight": (40, 40), "b.weight": (40, 40), "b.bias": (40,)}
STEPS = 2

READ = "verdicts.py _read"
"""Where all that a step waits for is read."""
POISONED = "protocols.py poisoned"
MORE: dict[str, tuple[str, ...]] = {
    "Threshold": ("threshold.py", "cuda/__init__.py threshold", POISONED),  # how much there is to send
    "TwoPass": (READ,),  # a server must know that it is finite before it adds it to what it keeps
    "Central": (READ,),
    "CompSkip": (READ, "comp_skip.py", POISONED),  # likewise; and whether to send is said in bytes
    "SkipAllReduce": (POISONED,),
    "ErrorReset": (READ, "error_reset.py"),  # likewise of a worker's own
    "Butterfly": (READ,),  # likewise of its partner's
    "PowerSGD": ("power_sgd.py",),  # there must be something to factorise
    "HessianAided": (READ, "curvature.py"),  # a product must not be taken of what is not finite
    "CompressedAllReduce": (POISONED,),
}
"""Who waits in every bucket, and where."""


def waits(case: Case) -> list[str]:
    """Where the host waits in the last step, with a bucket for each parameter."""
    with on_gpu() as gpu, kernels_that_write_zeros():
        named = [(name, torch.nn.Parameter(torch.ones(shape, device="cuda"))) for name, shape in SHAPES.items()]
        takes = bound_method(case).feedback.takes
        options = ({"lr": 0.1} if takes.learning_rate else {}) | ({"momentum": case.momentum} if takes.momentum else {})
        exchange = GradientExchange(named, case.make(), SelfTransport(), bucket_bytes=1, **options)
        for _ in range(STEPS):
            gpu.reads.clear()
            exchange.reduce({name: torch.ones(shape, device="cuda") for name, shape in SHAPES.items()})
        return [where.rpartition(" in ")[2] for where in gpu.reads]


def exceptions(case: Case) -> list[str]:
    method = bound_method(case)
    parts = (method.exchange, method.feedback, method.compressor, getattr(method.exchange, "server_compressor", None))
    return [where for part in parts for where in MORE.get(type(part).__name__, ())]


@pytest.mark.parametrize("case", [c for c in CASES if "hutchinson" not in c.name], ids=ids)  # which has a generator on the GPU
def test_a_step_waits_once(case: Case) -> None:
    """However many buckets there are; where a row waits more often, it is for the reason that is given. Once more where parameters are shifted: what
    somebody else wrote to them is looked for before it is overwritten."""
    if torch.__version__ < "2.3" and "matrix" in case.name:
        pytest.skip("torch 2.2 takes no stand-in of a gradient's gradient for a tensor on a GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Counter(waits(case))
    assert found
    once = 1 + ("x" in bound_method(case).feedback.slots(NO_SEGMENTS))
    if found[READ] <= once:
        del found[READ]
    assert not [where for where in found if not any(known in where for known in exceptions(case))], found


def test_waits_are_counted() -> None:
    """Control: what the host asks is seen, and where."""
    with on_gpu() as gpu:
        t = torch.ones(3, device="cuda")
        assert t.is_cuda and (t + 1).device.type == "cuda" and not gpu.reads
        for ask in (lambda: bool(t.any()), lambda: t.sum().item(), lambda: t.tolist(), lambda: t.cpu(), lambda: t.nonzero(), lambda: t[t > 0]):
            gpu.reads.clear()
            ask()
            assert gpu.reads
