"""Holding parameters at x − factor·t, and the sums over their bits, is one compiled pass, and gives what torch gives to the bit."""

from __future__ import annotations

import pytest
import torch

from hvd_ecsgd.kernels import column_sums, native, shift_, sums_of
from hvd_ecsgd.segments import Segments
from tests.unit.test_kernels import compiled, library, table, values, variants

SIZES = [0, 1, 2, 501, 502, 1003, 1004, 1005, 9000, 3]
LARGE = [1_100_001, 70_003]
"""Past the caches."""


def shifted(dtype: torch.dtype, sizes: list[int], factor: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters, which begin anywhere, and their sums."""
    segments = table(sizes, dtype)
    parameters = [torch.full((n + i % 3,), 7.0, dtype=dtype)[i % 3 :] for i, n in enumerate(sizes)]
    x, t = (values("gaussian", segments.numel + 1, dtype, i)[1:] for i in range(2))
    return parameters, shift_(parameters, segments, x, t, factor)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_one_pass_gives_the_bits_of_torch(dtype: torch.dtype, factor: float) -> None:
    for sizes in (SIZES, LARGE):
        with native.forced(None):
            expected, expected_sums = shifted(dtype, sizes, factor)
        for variant in variants() if sizes is SIZES else ["avx512"]:
            for n in (1, 2):
                torch.set_num_threads(n)
                with native.forced(library):
                    found, sums = shifted(dtype, sizes, factor)
                    again = sums_of(found, table(sizes, dtype))
                torch.set_num_threads(1)
                assert all(map(torch.equal, expected, found)), variant
                assert all(map(torch.equal, expected_sums, sums)) and all(map(torch.equal, sums, again)), variant
                assert all(torch.equal(column_sums(p), of_p) for p, of_p in zip(found, sums, strict=True)), variant


@compiled
def test_every_write_raises_the_version_counter() -> None:
    """By which autograd, and others who look at the parameters, know of it."""
    for kernels in (library, None):
        with native.forced(kernels):
            p = [torch.nn.Parameter(torch.zeros(3, 5)), torch.nn.Parameter(torch.zeros(()))]
            segments = Segments.of([("a", p[0]), ("b", p[1])])
            with torch.no_grad():
                shift_(p, segments, torch.ones(16), torch.ones(16), 0.5)
            assert all(t._version > 0 and bool((t == 0.5).all()) for t in p)


def shift_everything() -> None:
    """Under sanitizers."""
    for dtype in (torch.float32, torch.float64):
        for sizes in (SIZES, LARGE):
            shifted(dtype, sizes, 0.3)
