"""Asynchronous training over MPI: ranks that serve, and workers that do not wait for each other."""

from __future__ import annotations

from .optimizer import AsyncDistributedOptimizer, close, is_serving, leave

__all__ = ["AsyncDistributedOptimizer", "close", "is_serving", "leave"]
