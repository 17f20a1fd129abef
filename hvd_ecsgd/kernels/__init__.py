"""The few hot loops. `reference` is torch (and NumPy on CPU); `native` are the compiled ones and `cuda` those for GPUs, which give the same."""

from .accumulate import Addition, Unread
from .move import move_
from .native import LONGEST_BUCKET, Kernels, Native, all_finite, cuda_for, fingerprint, kernels_for, native_for
from .reference import (
    check_positions,
    check_rows,
    column_sums,
    draws,
    negative,
    pack_bits,
    pack_codes,
    signs,
    top_k_indices,
    top_k_rows,
    uniform,
    unpack_bits,
    unpack_codes,
)
from .shift import shift_, sums_of

__all__ = ["Addition", "Kernels", "LONGEST_BUCKET", "Native", "Unread", "all_finite", "check_positions", "check_rows", "column_sums",
           "cuda_for", "draws", "fingerprint", "kernels_for", "move_", "native_for", "negative", "pack_bits", "pack_codes", "shift_", "signs",
           "sums_of", "top_k_indices", "top_k_rows", "uniform", "unpack_bits", "unpack_codes"]  # fmt: skip
