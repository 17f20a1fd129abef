"""Ranks that are gone, as an MPI with ULFM (user-level failure mitigation) tells of them: Open MPI 5 under `mpirun --with-ft ulfm`."""

from __future__ import annotations

import os
import time

import numpy as np
from mpi4py import MPI

from hvd_ecsgd.transport.patience import Patience

__all__ = ["agree", "may_be_lost", "without_ulfm"]

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
    flag, patience = np.array([right], dtype=np.intc), Patience()
    try:
        request = comm.Iagree(flag)
        while not request.Test():
            time.sleep(patience.pause())
    except MPI.Exception:
        return False
    return bool(flag[0])
