"""One file per accumulate rule. A rule is a frozen dataclass that implements `hvd_ecsgd.protocols.Feedback`."""

from .cser import CSER
from .curvature import GradientSquares, Hutchinson, Matrix, Product
from .dist_ef_sgd import DistEFSGD
from .error_feedback import ErrorFeedback
from .hessian import HessianAided
from .local_momentum import LocalMomentum
from .mem_sgd import MemSGD
from .none import NoFeedback
from .pef import PEF

__all__ = [
    "CSER",
    "DistEFSGD",
    "ErrorFeedback",
    "GradientSquares",
    "HessianAided",
    "Hutchinson",
    "LocalMomentum",
    "Matrix",
    "MemSGD",
    "NoFeedback",
    "PEF",
    "Product",
]
