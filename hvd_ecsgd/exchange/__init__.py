"""One file per communication scheme: a frozen dataclass whose `run` is a generator that yields the handle it waits for."""

from .all_gather import AllGather
from .all_reduce import AllReduce
from .central import Central
from .comp_skip import CompSkip, SkipAllReduce
from .skip import Bernoulli, Every, NormBased
from .two_pass import TwoPass

__all__ = ["AllGather", "AllReduce", "Bernoulli", "Central", "CompSkip", "Every", "NormBased", "SkipAllReduce", "TwoPass"]
