"""What this MPI is: `python -m mpi_backend.about` prints one line of JSON."""

from __future__ import annotations

import json

__all__ = ["about"]


def about() -> dict[str, object]:
    """Vendor and version of the library that mpi4py is bound to, `thread_multiple` and `cuda_aware`. Initialises MPI in this process.

    Raises ImportError where mpi4py, or the library that it needs, is not there.
    """
    from mpi4py import MPI

    from .transport import cuda_aware

    vendor, version = MPI.get_vendor()
    return {
        "vendor": vendor,
        "version": ".".join(str(number) for number in version),
        "thread_multiple": MPI.Query_thread() == MPI.THREAD_MULTIPLE,
        "cuda_aware": cuda_aware(),
    }


if __name__ == "__main__":
    print(json.dumps(about()))
