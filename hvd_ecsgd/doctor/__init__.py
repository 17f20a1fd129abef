"""`hvd-ecsgd doctor`: what is here, whether it works, and what to do about what does not."""

from .command import add_arguments, doctor, environment
from .findings import Finding, State

__all__ = ["Finding", "State", "add_arguments", "doctor", "environment"]
