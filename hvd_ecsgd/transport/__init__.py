"""The networks an exchange can run over. `base` holds the protocol; nothing here is imported before it is needed."""

from .base import Handle, Ready, Transport
from .self_ import SelfTransport
from .simulated import SimulatedTransport, run_simulated

__all__ = ["Handle", "Ready", "SelfTransport", "SimulatedTransport", "Transport", "run_simulated"]
