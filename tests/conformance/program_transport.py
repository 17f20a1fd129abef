"""One rank of the conformance test: `program_transport.py mpi|horovod|torch FILE`."""

from __future__ import annotations

import sys

import torch

from tests.conformance.body import FLOATS, INTEGERS, SMALL, check_all


def main(kind: str, file: str = "") -> None:
    if kind == "mpi":
        from mpi_backend.transport import MPITransport

        t = MPITransport()
        check_all(t, (*FLOATS, *INTEGERS), (*FLOATS, *INTEGERS))
        print(f"conforms: rank {t.rank} of {t.size}")
        return
    if kind == "torch":
        import torch.distributed as dist

        from hvd_ecsgd.transport.torch_dist import TorchTransport
        from tests.torch.meeting import meet

        rank, size = meet(file)
        for n in (size, 3, 2, 1):
            if rank < n:  # from many to few: torch names a group by how many its ranks have made before
                group = dist.new_group(list(range(n)), use_local_synchronization=True)
                check_all(g := TorchTransport(group), (*FLOATS, *INTEGERS), (*FLOATS, *INTEGERS), by_rank=[SMALL])
                g.close()
                print(f"conforms: rank {g.rank} of {g.size}")
        return
    import horovod.torch as hvd

    from hvd_ecsgd.horovod.transport import HorovodTransport

    hvd.init()
    h = HorovodTransport()
    # Stock Horovod: no bfloat16 at all, no (u)int8 in an all-reduce, and half precision is summed in half precision.
    moves = (torch.float32, torch.float64, torch.float16, *INTEGERS)
    check_all(h, (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32), moves, wide_halves=False, by_rank=[])
    print(f"conforms: rank {h.rank} of {h.size}")


if __name__ == "__main__":
    main(*sys.argv[1:])
