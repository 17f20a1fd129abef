"""Ranks that are gone, as an MPI with ULFM (user-level failure mitigation) tells of them: Open MPI 5 under `mpirun --with-ft ulfm`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
from mpi4py import MPI

from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.patience import Patience

__all__ = [
    "Look",
    "agree",
    "among_those_that_live",
    "dead_of",
    "look_on",
    "lost_between",
    "may_be_lost",
    "one_by_one",
    "start_agreement",
    "without_ulfm",
]

T = TypeVar("T")

Look: TypeAlias = Callable[[Sequence[MPI.Request]], Sequence[int] | None]
"""Which of the requests are complete now, by their places; None where there are none. Those that are will not be looked at again."""

one_by_one = threading.Lock()
"""Of whoever begins an agreement, and whoever may receive a message of one, which is everybody that asks MPI for what has come, about anything.

While a thread begins an agreement Open MPI puts messages of agreements aside that come to another thread, and writes a pointer over the value in them
(seen with 5.0; in its sources of 2026, too): once in some ten thousand agreements ranks were told that something had failed, and nothing had.
"""

_LOST = {getattr(MPI, name, None) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED", "ERR_IN_STATUS")} - {None}
"""The last one says that one request of several has failed, and not how."""


def may_be_lost(error: MPI.Exception) -> bool:
    """Whether a rank that is gone can be the reason. That one is, `agree` says."""
    return error.Get_error_class() in _LOST


def without_ulfm() -> str:
    """Why ranks that live cannot go on without those that die; empty where they can."""
    version = MPI.Get_library_version().split(",")[0].strip("\0")
    if not version.startswith("Open MPI"):
        return f"this is {version}, and ULFM is used of Open MPI 5 only"
    if not hasattr(MPI.Comm, "Shrink"):
        return "this mpi4py is older than 4.0, and does not have ULFM's functions"
    if os.environ.get("OMPI_MCA_mpi_ft_enable", "0").lower() not in ("1", "true", "yes"):  # noqa: SIM112
        return f"this job of {version} was not started for it (mpirun --with-ft ulfm)"
    return ""


def agree(comm: MPI.Intracomm, right: bool) -> bool:
    """Whether it is `right` on all ranks of `comm`, and none of them is gone that was not left out of it; the same on all that live.

    Collective, also where `comm` was revoked. A rank that is gone is not waited for.
    """
    patience = Patience()
    try:
        request, flag = start_agreement(comm, right)
        while not _is_complete(request):
            time.sleep(patience.pause())
    except MPI.Exception:
        return False
    return bool(flag[0])


def start_agreement(comm: MPI.Intracomm, right: bool) -> tuple[MPI.Request, np.ndarray]:
    """The request of `agree`, and what it writes to. `Test` raises `MPI.Exception` on all that live where some rank of `comm` is gone."""
    flag = np.array([right], dtype=np.intc)
    with one_by_one:
        return comm.Iagree(flag), flag


def _is_complete(agreement: MPI.Request) -> bool:
    with one_by_one:
        return agreement.Test()


def look_on(comm: MPI.Comm) -> Look:
    """How one looks at requests on `comm`. A look raises `MPI.Exception` if one has failed and, with ULFM, if a rank of `comm` is gone."""
    return MPI.Request.Testsome if without_ulfm() else _Outliving(comm)


class _Outliving:
    """MPI never hears of a request before it is complete.

    Testing a request to a rank that is gone ends it and frees it, though what was sent may still lie with that rank's memory; when it comes back
    from there, Open MPI ends the process, for an error of a request that nobody can be told of. Asking for its status leaves it as it is.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm

    def __call__(self, requests: Sequence[MPI.Request]) -> Sequence[int] | None:
        with one_by_one:
            if complete := [i for i, request in enumerate(requests) if request.Get_status()]:
                MPI.Request.Testsome([requests[i] for i in complete])
        if complete:
            return complete
        if self._comm.Is_revoked():
            raise MPI.Exception(MPI.ERR_REVOKED)
        if dead_of(self._comm):
            raise MPI.Exception(MPI.ERR_PROC_FAILED)
        return []


def dead_of(comm: MPI.Comm) -> set[int]:
    """Ranks of `comm` that MPI knows to have died."""
    dead = comm.Get_failed()
    try:
        if not (count := dead.Get_size()):
            return set()
        everyone = comm.Get_group()
        try:
            return set(MPI.Group.Translate_ranks(dead, list(range(count)), everyone))
        finally:
            everyone.Free()
    finally:
        dead.Free()


def among_those_that_live(comm: MPI.Intracomm, make: Callable[[MPI.Intracomm], T], unmake: Callable[[T], None]) -> T:
    """What all that live have made of a communicator of theirs, in the order that they had in `comm`; `unmake` what one that is gone took no part in.

    Collective over those of `comm` that live. Raises `TransportError` on all where none is gone."""
    size = comm.Get_size()
    while True:
        shrunk = comm.Shrink()
        assert isinstance(shrunk, MPI.Intracomm)
        if shrunk.Get_size() == size:
            raise TransportError("communication has failed on some rank, and no rank is gone.")
        try:
            made = make(shrunk)
        except (MPI.Exception, TransportError):  # one more is gone
            shrunk.Revoke()
            agree(shrunk, False)
        else:
            if agree(shrunk, True):
                return made
            unmake(made)
        comm = shrunk


def lost_between(before: MPI.Comm, now: MPI.Comm) -> list[int]:
    """Ranks of `before` that are not in `now`."""
    old, new = before.Get_group(), now.Get_group()
    here = MPI.Group.Translate_ranks(old, list(range(old.Get_size())), new)
    old.Free()
    new.Free()
    return [r for r, there in enumerate(here) if there == MPI.UNDEFINED]
