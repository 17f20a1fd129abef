"""One file per communication scheme: a frozen dataclass whose `run` is a generator that yields the handle it waits for."""

from .all_gather import AllGather
from .all_reduce import AllReduce
from .two_pass import TwoPass

__all__ = ["AllGather", "AllReduce", "TwoPass"]
