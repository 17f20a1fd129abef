"""Every kernel compiled for a GPU that need not be there, down to its machine code, by Triton and its assembler.   program_compile.py [80 90 …]

Triton's interpreter takes more than its compiler does: types that differ between branches, shapes that are no powers of two. Prints RESULT and, as
JSON, by kernel how many variants (types, constants) were compiled, and what failed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from typing import Any

import numpy as np
import torch

from hvd_ecsgd.kernels import cuda
from hvd_ecsgd.kernels.cuda import Cuda
from tests.gpu import program_kernels as checks

_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip

_TO_ZERO = ("draw_below", "count_above", "write_above", "histogram", "select")


def launches() -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    """(kernel, types of its arguments, constants) of every launch that compressors and rules make, each once. Nothing is launched."""
    found: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {}

    def noted(self: Cuda, name: str, programs: int, *arguments: Any, B: int | None = cuda.TILE, **constants: Any) -> None:
        kernel = getattr(cuda._loaded()[0], name)
        types = {}
        for argument, value in zip(kernel.arg_names, arguments):
            types[argument] = f"*{_TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64) and name in _TO_ZERO:
                value.zero_()  # what would be computed is not, and must do no harm where it is read
        constants = constants | ({} if B is None else {"B": B})
        found[repr((name, types, constants))] = (name, types, constants)

    before, Cuda._run = Cuda._run, noted  # type: ignore[method-assign]
    try:
        for compressor in checks.EVERY:
            for dtype in (torch.float32, torch.float64):
                ours = checks.Side(compressor, checks.SIZES, dtype, 1, checks.CPU)
                v = torch.ones(sum(checks.SIZES), dtype=dtype)
                theirs = checks.Side(compressor, checks.SIZES, dtype, 1, None)
                _, payload = theirs.extracted(v)
                with contextlib.suppress(Exception):
                    ours.extracted(v)
                for add in (True, False):
                    with checks.native.forced(Cuda), contextlib.suppress(Exception):
                        compressor.decode_(v, payload, ours.segments, checks.KEY, 1.0, add=add)
        for check in (checks.check_accumulate, checks.check_shift_and_move):
            with contextlib.suppress(Exception):
                check(checks.CPU, False)
        for rule in checks.RULES:  # and what follows where a flag says so
            for dtype, kind in checks.KINDS_OF_GRADIENTS:
                for flags in ((1, 0), (1, 1)):
                    with checks.swapped(torch, "zeros", lambda *a, flags=flags, **k: torch.tensor(flags, **k) if a == (2,) else zeros(*a, **k)):
                        checks.accumulated(rule, dtype, kind, None, checks.CPU)
    finally:
        Cuda._run = before  # type: ignore[method-assign]
    return list(found.values())


zeros = torch.zeros


def compiled(name: str, types: dict[str, str], constants: dict[str, Any], capability: int) -> str:
    """'' or what is wrong."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(cuda._loaded()[0], name)
    try:
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants))
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8, "enable_fp_fusion": False})
        return "" if result.asm.get("cubin") else "no machine code"
    except Exception as error:
        return f"{constants}: {error!r}"[:1500]


def main() -> None:
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    found: dict[str, Any] = {}
    wanted = launches()
    for capability in [int(a) for a in sys.argv[1:]] or [90]:
        for name, types, constants in wanted:
            row = found.setdefault(name, {"variants": 0, "failed": []})
            row["variants"] += 1
            row["failed"] += [said] if (said := compiled(name, types, constants, capability)) else []
    print(f"RESULT {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
