"""One file per operator C. A compressor is a frozen dataclass that implements `hvd_ecsgd.protocols.Compressor`."""

from .block_top_k import BlockTopK
from .cast import Cast
from .identity import Identity
from .random_block import RandomBlock
from .sign import Sign
from .top_k import TopK

__all__ = ["BlockTopK", "Cast", "Identity", "RandomBlock", "Sign", "TopK"]
