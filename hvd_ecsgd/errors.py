"""Errors a user may want to catch by type. Each message names the parameter, what was expected, what came, and the remedy."""

from __future__ import annotations


class CompressionError(ValueError):
    """A wrong argument, or a method used where it cannot work."""


class UnboundParameterError(CompressionError):
    """A gradient arrived that belongs to no bound parameter (or to two of them)."""


class SequenceError(CompressionError, AssertionError):
    """Calls in an order that would lose gradients. Horovod raises AssertionError there, so scripts may expect one."""


class CheckpointError(CompressionError):
    """A checkpoint is missing, damaged, or not of this training; or it could not be written, and the previous one stands."""


class DisagreementError(RuntimeError):
    """Ranks hold different settings, parameters, steps or replicas; raised on every rank."""


class TransportError(RuntimeError):
    """A collective could not complete, or was called in a way that cannot complete."""


class PeerLostError(TransportError):
    """A collective can never be complete, as a worker that it needs is gone."""
