"""Gradient compression with error feedback, for an unmodified Horovod and for optimizers of its own.

    compression = Compression.random_block(ratio=64).bind(model)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), compression=compression)
    compression.attach(optimizer)

Importing this package needs torch only; Horovod is imported when Horovod calls us.
"""

from .compression import BoundCompression, Compression, double_squeeze_comparison
from .errors import CompressionError, DisagreementError, TransportError, UnboundParameterError
from .optimizer import DistributedOptimizer
from .version import __version__

__all__ = [
    "BoundCompression",
    "Compression",
    "CompressionError",
    "DisagreementError",
    "DistributedOptimizer",
    "TransportError",
    "UnboundParameterError",
    "__version__",
    "double_squeeze_comparison",
]
