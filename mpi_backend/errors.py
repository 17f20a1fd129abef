"""Errors of collectives, under Horovod's name."""

from __future__ import annotations

from hvd_ecsgd.errors import DisagreementError

__all__ = ["HorovodInternalError", "MismatchError"]


class HorovodInternalError(RuntimeError):
    """A collective failed: another rank left, a tensor never came, MPI reported an error, or the communication thread ended. As Horovod's."""


class MismatchError(HorovodInternalError, DisagreementError):
    """Ranks submitted one name with different shapes, types or operations. Raised on every rank; the message says who sent what."""
