"""Gradient compression with error feedback, for an unmodified Horovod and for optimizers of its own.

    compression = Compression.random_block(ratio=64).bind(model)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), compression=compression)
    compression.attach(optimizer)

Importing this package needs torch and NumPy only; Horovod is imported when Horovod calls us.
"""

from . import telemetry
from .central_vr import CentralVR
from .checkpoint import load_checkpoint, save_checkpoint
from .compression import Compression, double_squeeze_comparison
from .core.bound import BoundCompression
from .core.schedule import exponential_ratios
from .errors import CheckpointError, CompressionError, DisagreementError, SequenceError, TransportError, UnboundParameterError
from .gradient_exchange import GradientExchange
from .optimizer import DistributedOptimizer
from .version import __version__

__all__ = [
    "BoundCompression",
    "CentralVR",
    "CheckpointError",
    "Compression",
    "CompressionError",
    "DisagreementError",
    "SequenceError",
    "DistributedOptimizer",
    "GradientExchange",
    "TransportError",
    "UnboundParameterError",
    "__version__",
    "load_checkpoint",
    "save_checkpoint",
    "double_squeeze_comparison",
    "exponential_ratios",
    "telemetry",
]
