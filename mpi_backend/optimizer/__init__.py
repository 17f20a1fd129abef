"""Horovod's DistributedOptimizer, and `join`, which takes part in the steps of others."""

from __future__ import annotations

from .distributed import DistributedOptimizer
from .join import join

__all__ = ["DistributedOptimizer", "join"]
