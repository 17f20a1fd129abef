"""Train on scikit-learn's bundled digits without waiting for each other: the lines that differ from a plain Horovod script are marked with (+).

    launch/mpirun.sh -n 4 --servers 1 python examples/async_digits.py
    launch/mpirun.sh -n 4 --servers 1 python examples/async_digits.py --slow 0.02        # one worker takes 20 ms longer for each batch

Every worker goes over its share of the data as often as `--epochs` says, at its own pace.
"""

from __future__ import annotations

import argparse
import time

import torch
from digits import accuracy, load_digits, make_model

import mpi_backend as hvd
from hvd_ecsgd import Compression  # (+)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--tau-max", type=int, default=None, help="staleness at most, in updates (4 times the number of workers)")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds that worker 0 takes longer for each batch")
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_digits()
    model = make_model()
    optimizer = hvd.AsyncDistributedOptimizer(  # (+) the ranks that serve do so in here, and leave
        torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9),
        model.named_parameters(),
        Compression.double_squeeze(),
        tau_max=args.tau_max,
    )
    images, labels = data.train_images[hvd.rank() :: hvd.size()], data.train_labels[hvd.rank() :: hvd.size()]
    started = time.perf_counter()
    for epoch in range(args.epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(16):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            if hvd.rank() == 0:
                time.sleep(args.slow)
            optimizer.step()
    own = time.perf_counter() - started
    optimizer.finish()  # (+) all workers hold the same x from here on
    seconds = hvd.allgather(torch.tensor([own], dtype=torch.float64))
    if hvd.rank() == 0:
        dense = 2 * sum(p.nbytes for p in model.parameters()) * args.epochs * len(order.split(16))
        ratio = dense / (optimizer.bytes_sent + optimizer.bytes_received)
        print(
            f"{hvd.size()} workers: test accuracy {accuracy(model, data):.3f}, compression {ratio:.1f}x, seconds by worker",
            *(f"{s:.1f}" for s in seconds),
        )


if __name__ == "__main__":
    main()
