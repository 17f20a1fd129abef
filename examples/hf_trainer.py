"""Hugging Face's `Trainer` with compressed gradients: DDP, in which it wraps the model, gets our hook. Lines that this adds are marked with (+).

    pip install '.[frameworks]'
    torchrun --nproc-per-node 2 examples/hf_trainer.py --method none top_k

The model is a small GPT-2, made from a configuration and trained on the bytes of Python's own library: nothing is downloaded. Trainer shares the data
out, evaluates and steps as ever. It multiplies gradients by 1 where it does not clip them, so methods that apply the update themselves
(detached, local_momentum) refuse it. Ends with a table and a plot.
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
from bytes_lm import LENGTH, draw, load_text, spread, windows
from common import IN_GRADIENTS, METHODS, Curve, plot, positive, table, times, unwritable
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hvd_ecsgd import ddp  # (+)


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Of a text, from each of `begins`."""

    def __init__(self, text: torch.Tensor, begins: torch.Tensor) -> None:
        self.rows = windows(text, begins, LENGTH)[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class CompressedTrainer(Trainer):  # (+)
    """Trainer, whose gradients travel as `compression` says, with plain SGD inside."""

    def __init__(self, compression: Any, **options: Any) -> None:
        super().__init__(**options)
        self.unbound = compression
        self.hook: ddp.DDPHook | None = None
        self.add_callback(Register(self))

    def register(self) -> None:
        """When the model is wrapped, and before it is trained."""
        self.hook = ddp.register(self.model_wrapped, self.unbound)
        self.hook.compression.attach(getattr(self.optimizer, "optimizer", self.optimizer))  # follows the schedule


class Register(TrainerCallback):  # (+)
    def __init__(self, trainer: CompressedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *arguments: Any, **more: Any) -> None:
        self.trainer.register()


class Watch(TrainerCallback):
    """Notes held-out losses, and what was sent until then."""

    def __init__(self) -> None:
        self.curve = Curve([], [], [])
        self.trainer: CompressedTrainer | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **more: Any) -> None:
        assert self.trainer is not None and self.trainer.hook is not None
        self.curve.x.append(state.global_step)
        self.curve.y.append(metrics["eval_loss"])
        self.curve.megabytes.append(self.trainer.hook.compression.traffic.sent / 1e6)


def train(method: str, args: argparse.Namespace, training: Windows, held_out: Windows) -> tuple[Curve, float, float]:
    """What it came to, the compression ratio, and seconds."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=128, n_layer=2, n_head=4, use_cache=False))
    sgd = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [max(1, args.steps // 2)])
    settings = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        max_grad_norm=0.0,  # (+) clip with Compression.…(clip_norm=…), where the method does not leave the update to SGD
        eval_strategy="steps",
        eval_steps=max(1, args.steps // 10),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    watch = Watch()
    watch.trainer = trainer = CompressedTrainer(  # (+)
        METHODS[method](args.ratio),
        model=model,
        args=settings,
        train_dataset=training,
        eval_dataset=held_out,
        optimizers=(sgd, schedule),
        callbacks=[watch],
    )
    started = time.perf_counter()
    trainer.train()
    assert trainer.hook is not None
    return watch.curve, trainer.hook.compression.traffic.ratio, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--method", choices=IN_GRADIENTS, nargs="+", default=["none", "top_k"], help="one after the other")
    parser.add_argument("--ratio", type=float, default=64.0, help="elements in ÷ elements sent, for methods that have a ratio")
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for hf_trainer.png and hf_trainer.json")
    args = parser.parse_args()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        raise SystemExit("error: Trainer makes no DDP model for one process: torchrun --nproc-per-node 2 examples/hf_trainer.py")
    if problem := unwritable(args.out, "hf_trainer"):
        raise SystemExit(f"error: {problem}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    text = load_text()
    training = Windows(text.train, draw(text.train, args.steps * args.batch * size, LENGTH, torch.Generator().manual_seed(0)))
    held_out = Windows(text.held_out, spread(text.held_out, 32, LENGTH))
    curves, rows = dict[str, Curve](), list[tuple[str, ...]]()
    for method in args.method:
        curve, ratio, seconds = train(method, args, training, held_out)
        curves[method] = curve
        rows.append((method, f"{curve.y[-1]:.3f}", f"{curve.megabytes[-1]:.2f}", times(ratio), f"{seconds:.1f}"))
    if rank == 0:
        print(f"{table(('method', 'loss, nats a byte', 'MB sent per worker', 'compression', 'seconds'), rows)}\n")
        (args.out / "hf_trainer.json").write_text(json.dumps({method: list(curve.y) for method, curve in curves.items()}, indent=1))
        title = f"A small GPT-2 on bytes, by Trainer, {size} workers, learning rate {args.lr:g}"
        plot(curves, args.out / "hf_trainer.png", title=title, x="step", y="loss of held-out bytes, nats a byte")
        print(f"Plot: {args.out / 'hf_trainer.png'}")


if __name__ == "__main__":
    main()
