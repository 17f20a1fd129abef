"""PyTorch Lightning with compressed gradients: its DDP strategy, with our hook in place of the dense all-reduce. Lines that this adds: (+).

    pip install '.[frameworks]'
    torchrun --nproc-per-node 2 examples/lightning_ddp.py --method none detached

A small transformer on the bytes of Python's own library (examples/bytes_lm.py): nothing is downloaded. Lightning shares the data out, averages, and
steps as ever; the hook alone knows of compression. Ends with a table and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from bytes_lm import LENGTH, Transformer, draw, load_text, loss_of, spread, windows
from common import METHODS, Curve, plot, positive, table, times, unwritable
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from hvd_ecsgd import ddp  # (+)


class CompressedDDP(DDPStrategy):  # (+)
    """DDP, whose gradients travel as `compression` says."""

    def __init__(self, compression: Any, **options: Any) -> None:
        super().__init__(**options)
        self.unbound = compression
        self.hook: ddp.DDPHook | None = None

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)  # the model is wrapped now, and the optimizers are there
        self.hook = ddp.register(self.model, self.unbound)
        self.hook.compression.attach(self.optimizers[0])  # follows the schedule


class Bytes(LightningModule):
    """The model with its loss, and what it came to on held-out text."""

    def __init__(self, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.steps = Transformer(width=128), lr, steps
        self.x: list[float] = []
        self.y: list[float] = []
        self.megabytes: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return loss_of(self.model, (batch[0], batch[1]))

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        strategy: Any = self.trainer.strategy
        compression = strategy.hook.compression
        with compression.at("averaged"):  # (+) DEF and SAEF train at shifted parameters; others are unaffected
            self.y.append(float(loss_of(self.model, (batch[0], batch[1]))))
        self.x.append(self.global_step)
        self.megabytes.append(compression.traffic.sent / 1e6)

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [max(1, self.steps // 2)])
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(method: str, args: argparse.Namespace, training: DataLoader[Any], held_out: DataLoader[Any]) -> tuple[Bytes, float, float]:
    """The module, the compression ratio, and seconds."""
    seed_everything(0, verbose=False)
    module, strategy = Bytes(args.lr, args.steps), CompressedDDP(METHODS[method](args.ratio))  # (+)
    trainer = Trainer(
        strategy=strategy,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        max_steps=args.steps,
        max_epochs=-1,
        val_check_interval=max(1, args.steps // 10),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(module, training, held_out)
    assert strategy.hook is not None
    return module, strategy.hook.compression.traffic.ratio, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--method", choices=sorted(METHODS), nargs="+", default=["none", "detached"], help="one after the other")
    parser.add_argument("--ratio", type=float, default=64.0, help="elements in ÷ elements sent, for methods that have a ratio")
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for lightning_ddp.png and lightning_ddp.json")
    args = parser.parse_args()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if problem := unwritable(args.out, "lightning_ddp"):
        raise SystemExit(f"error: {problem}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*(num_workers|batch_size|sync_dist).*")
    text = load_text()
    begins = draw(text.train, args.steps * args.batch * size, LENGTH, torch.Generator().manual_seed(0))
    training = DataLoader(TensorDataset(*windows(text.train, begins, LENGTH)), batch_size=args.batch, shuffle=True)
    tested = windows(text.held_out, spread(text.held_out, 32 * size, LENGTH), LENGTH)
    held_out = DataLoader(TensorDataset(*tested), batch_size=32)
    curves, rows = dict[str, Curve](), list[tuple[str, ...]]()
    for method in args.method:
        module, ratio, seconds = train(method, args, training, held_out)
        curves[method] = Curve(module.x, module.y, module.megabytes)
        rows.append((method, f"{module.y[-1]:.3f}", f"{module.megabytes[-1]:.2f}", times(ratio), f"{seconds:.1f}"))
    if rank == 0:
        print(f"{table(('method', 'loss, nats a byte', 'MB sent per worker', 'compression', 'seconds'), rows)}\n")
        (args.out / "lightning_ddp.json").write_text(json.dumps({method: list(curve.y) for method, curve in curves.items()}, indent=1))
        title = f"A small transformer on bytes, by Lightning, {size} workers, learning rate {args.lr:g}"
        plot(curves, args.out / "lightning_ddp.png", title=title, x="step", y="loss of held-out bytes, nats a byte")
        print(f"Plot: {args.out / 'lightning_ddp.png'}")


if __name__ == "__main__":
    main()
