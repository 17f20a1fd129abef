"""The training of digits.py in a plain DistributedDataParallel script: the three lines that compression adds are marked with (+).

    torchrun --nproc-per-node 2 examples/ddp.py --method double_squeeze

It gives the weights of `mpirun -n 2 python examples/digits.py` with the same options: to the bit on two ranks, to float32 rounding on more.
"""

from __future__ import annotations

import argparse
import hashlib

import torch
import torch.distributed as dist
from common import METHODS, positive
from digits import accuracy, load_digits, make_model
from torch.nn.parallel import DistributedDataParallel

from hvd_ecsgd import ddp  # (+)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--method", choices=sorted(METHODS), default="detached")
    parser.add_argument("--ratio", type=float, default=64.0, help="elements in ÷ elements sent, for methods that have a ratio")
    parser.add_argument("--epochs", type=positive, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, size, batch, data = dist.get_rank(), dist.get_world_size(), 16, load_digits()

    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    compression = ddp.register(model, METHODS[args.method](args.ratio)).compression  # (+)
    compression.attach(optimizer)  # (+) follows the learning-rate schedule
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, args.epochs // 2), max(2, args.epochs * 3 // 4)])
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(args.epochs):
        order = torch.randperm(len(data.train_labels), generator=shuffle)
        for step in range(len(order) // (batch * size)):
            first = (step * size + rank) * batch
            mine = order[first : first + batch]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(data.train_images[mine]), data.train_labels[mine]).backward()
            optimizer.step()
        schedule.step()

    with compression.at("averaged"):  # DEF and SAEF train at shifted parameters; others are unaffected
        test, weights = accuracy(model, data), torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    if rank == 0:
        traffic, digest = compression.traffic, hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]
        print(f"ddp {args.method}: test accuracy {test:.3f}, {traffic.sent / 1e6:.2f} MB sent per worker, weights {digest}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
