"""Errors of collectives, under Horovod's name."""

from __future__ import annotations

from hvd_ecsgd.errors import DisagreementError, PeerLostError

__all__ = ["HorovodInternalError", "MismatchError", "RankLostError"]


class HorovodInternalError(RuntimeError):
    """A collective failed: another rank left, a tensor never came, MPI reported an error, or the communication thread ended. As Horovod's."""


class RankLostError(HorovodInternalError, PeerLostError):
    """A rank is gone that this collective needs. With MPI_BACKEND_ON_FAILURE=shrink all ranks that live raise it, in the same call, and are a job
    of their own by then: `size()` and `rank()` are new."""


class MismatchError(HorovodInternalError, DisagreementError):
    """Ranks submitted one name with different shapes, types or operations. Raised on every rank; the message says who sent what."""
