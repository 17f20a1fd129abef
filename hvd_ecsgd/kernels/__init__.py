"""The few hot loops. `reference` is torch (and NumPy on CPU); native implementations take the same arguments and give the same results."""

from .reference import all_finite, negative, pack_bits, signs, top_k_indices, unpack_bits

__all__ = ["all_finite", "negative", "pack_bits", "signs", "top_k_indices", "unpack_bits"]
