"""One file per operator C. A compressor is a frozen dataclass that implements `hvd_ecsgd.protocols.Compressor`."""

from .block_top_k import BlockTopK
from .cast import Cast
from .global_random_block import GlobalRandomBlock
from .identity import Identity
from .natural import Natural
from .qsgd import QSGD
from .random_block import RandomBlock
from .random_k import RandomK
from .rounding import Rounding
from .sign import Sign
from .ternary import Ternary
from .threshold import Threshold
from .top_k import TopK

__all__ = [
    "BlockTopK",
    "Cast",
    "GlobalRandomBlock",
    "Identity",
    "Natural",
    "QSGD",
    "RandomBlock",
    "RandomK",
    "Rounding",
    "Sign",
    "Ternary",
    "Threshold",
    "TopK",
]
