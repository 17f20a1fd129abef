"""One file per communication scheme: a frozen dataclass whose `run` is a generator that yields the handle it waits for."""

from .all_gather import AllGather
from .all_reduce import AllReduce
from .butterfly import Butterfly
from .central import Central
from .comp_skip import CompSkip, SkipAllReduce
from .compressed_all_reduce import CompressedAllReduce, HorovodCompressor, is_horovod_compressor
from .error_reset import ErrorReset
from .power_sgd import PowerSGD
from .skip import Bernoulli, Every, NormBased, Rounds
from .two_pass import TwoPass

__all__ = [
    "AllGather",
    "AllReduce",
    "Bernoulli",
    "Butterfly",
    "Central",
    "CompSkip",
    "CompressedAllReduce",
    "ErrorReset",
    "Every",
    "HorovodCompressor",
    "NormBased",
    "PowerSGD",
    "Rounds",
    "SkipAllReduce",
    "TwoPass",
    "is_horovod_compressor",
]
