"""The few hot loops. `reference` is torch (and NumPy on CPU); native implementations take the same arguments and give the same results."""

from .reference import (
    all_finite,
    column_sums,
    fingerprint,
    negative,
    pack_bits,
    pack_codes,
    signs,
    top_k_indices,
    top_k_rows,
    unpack_bits,
    unpack_codes,
)

__all__ = ["all_finite", "column_sums", "fingerprint", "negative", "pack_bits", "pack_codes", "signs", "top_k_indices", "top_k_rows", "unpack_bits",
           "unpack_codes"]  # fmt: skip
