"""Horovod's module of the same name, for scripts that derive compressors of their own from its classes."""

from __future__ import annotations

from typing import Any

import torch

from hvd_ecsgd.compression import Compression

__all__ = ["Compression", "Compressor", "FP16Compressor", "NoneCompressor"]


class Compressor:
    """A class to derive from; any with these two functions will do (`hvd_ecsgd.exchange.HorovodCompressor`)."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """What travels in place of `tensor`, and what `decompress` needs to know."""
        raise NotImplementedError

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """What `compress` was given, of what came."""
        raise NotImplementedError


class NoneCompressor(Compressor):
    """`Compression.none` as a class."""

    compress = staticmethod(Compression.none.compress)
    decompress = staticmethod(Compression.none.decompress)


class FP16Compressor(Compressor):
    """`Compression.fp16` as a class."""

    compress = staticmethod(Compression.fp16.compress)
    decompress = staticmethod(Compression.fp16.decompress)
