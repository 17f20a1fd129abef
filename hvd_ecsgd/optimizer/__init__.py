"""DistributedOptimizer over any transport: the driver that feeds the gradients of a torch optimizer to an exchange and applies what comes back."""

from .distributed import DistributedOptimizer, driver_of
from .executor import Executor, Inline, Observer

__all__ = ["DistributedOptimizer", "Executor", "Inline", "Observer", "driver_of"]
