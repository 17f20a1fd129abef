"""One rank fails where the others wait for it. Arguments: `chained`, with a hook of its own; `rechained`, with one
around the package's, which is then initialised again; `held`, with torch.distributed's around it, which holds back what is
printed; `unhooked`, with Python's own hook put back."""

from __future__ import annotations

import sys
import time

import torch

import mpi_backend as hvd


def previous(kind: type[BaseException], error: BaseException, trace: object) -> None:
    print(f"the previous hook saw {kind.__name__}: {error}", file=sys.stderr)


if "chained" in sys.argv:
    sys.excepthook = previous
hvd.init()
if "rechained" in sys.argv:
    packages = sys.excepthook

    def around(kind: type[BaseException], error: BaseException, trace: object) -> None:
        print(f"the hook around saw {kind.__name__}: {error}", file=sys.stderr)
        packages(kind, error, trace)  # type: ignore[arg-type]

    sys.excepthook = around
    hvd.shutdown()
    hvd.init()
if "held" in sys.argv:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    assert "torch" in sys.excepthook.__module__
if "unhooked" in sys.argv:
    sys.excepthook = sys.__excepthook__
if hvd.rank() == hvd.size() - 1:
    time.sleep(0.5)  # the others are waiting by now
    print(f"raised at {time.time()}", flush=True)
    raise RuntimeError("rank fails on purpose")
hvd.allreduce(torch.ones(3))
print("got through", flush=True)
