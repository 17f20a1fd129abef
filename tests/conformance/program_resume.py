"""One rank of: every method saved in one job and loaded in another, on either backend.

    program_resume.py BACKEND save FOLDER           trains 6 steps and saves after 4, every method
    program_resume.py BACKEND load FOLDER SIZE…     loads what so many ranks saved; of as many ranks it trains on and compares with the 6 steps
    program_resume.py BACKEND save-kinds …          the same with one method of each kind of exchange and of rule, with 3 ranks of exchange alone;
                                                    save-some, load-some: with four

Each rank writes what it found to FOLDER, as JSON: {method: result}.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import warnings
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from hvd_ecsgd import load_checkpoint, save_checkpoint
from hvd_ecsgd.checkpoint.resize import shares
from tests.cases import CASES, KINDS, PAIRS, Case
from tests.problems import mlp, slot, train, weights

FIRST, LAST = 4, 6
SOME = ("none", "top_k", "random_block", "double_squeeze")
BACKENDS = {"mpi": "mpi_backend", "horovod": "horovod.torch"}


class Training:
    """One method's training on real ranks, with a learning rate that changes where the checkpoint is taken."""

    def __init__(self, hvd: Any, case: Case) -> None:
        self.rank = hvd.rank()
        self.model = mlp()
        named = [(f"{case.name}/{n}", p) for n, p in self.model.named_parameters()]
        self.compression = case.make().bind(named)
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=case.momentum)
        self.optimizer = hvd.DistributedOptimizer(sgd, named_parameters=named, compression=self.compression)
        self.compression.attach(self.optimizer)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.3)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            train(self.model, self.optimizer, self.rank, [step])
            self.schedule.step()

    def save(self, folder: Path) -> None:
        save_checkpoint(folder, self.model, self.optimizer, self.compression, extras=self.schedule.state_dict())

    def load(self, folder: Path) -> Any:
        loaded = load_checkpoint(folder, self.model, self.optimizer, self.compression)
        self.schedule.load_state_dict(loaded.extras)
        return loaded

    def digest(self) -> str:
        """Of everything this rank holds: x, the optimizer's state, residuals, momentum, counters."""
        state = self.compression.state_dict()
        tensors = [weights(self.model, self.compression)]
        tensors += [t for s in self.optimizer.state_dict()["state"].values() for t in s.values() if t is not None]
        tensors += [t for _, entry in sorted(state["parameters"].items()) for _, t in sorted(entry.items()) if isinstance(t, torch.Tensor)]
        digest = blake2b(f"{state['step']} {self.optimizer.param_groups[0]['lr']}".encode())
        for t in tensors:
            digest.update(t.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()


def mean_residual(training: Training, size: int) -> list[float]:
    """mean_i e_i in float64, over all workers."""
    mine = slot(training.compression, "residual").double()
    parts = training.compression.transport.allgather(mine, "residuals", [mine.numel()] * size).wait()
    return [float(v) for v in torch.stack(parts).mean(0)]


def save(hvd: Any, case: Case, folder: Path) -> Any:
    training = Training(hvd, case)
    training.train(0, FIRST)
    training.save(folder / case.name)
    mean = mean_residual(training, hvd.size())
    training.train(FIRST, LAST)
    return {"digest": training.digest(), "mean": mean, "weights": weights(training.model).tolist() if case.name in SOME else []}


def resume(hvd: Any, case: Case, folder: Path, saved: Any) -> Any:
    """Whether the 2 steps after loading lead where the 6 steps led; and, for some, whether they do without the compression's state."""
    training, result = Training(hvd, case), {}
    training.load(folder / case.name)
    if case.name in SOME:
        forgetful = Training(hvd, case)
        forgetful.model.load_state_dict(training.model.state_dict())
        forgetful.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
        forgetful.schedule.load_state_dict(training.schedule.state_dict())
        forgetful.train(FIRST, LAST)
    training.train(FIRST, LAST)
    if case.name in SOME:
        w = torch.tensor(saved["weights"])
        result["off"] = (weights(training.model) - w).abs().max().item()
        result["off without the state"] = (weights(forgetful.model) - w).abs().max().item()
    return {"bit-exact": training.digest() == saved["digest"], **result}


def resize(hvd: Any, case: Case, folder: Path, saved: Any, saved_size: int) -> Any:
    """Largest change of the mean residual over the largest residual, and whether the ranks go on with the same bits."""
    training = Training(hvd, case)
    training.load(folder / case.name)
    before, after = torch.tensor(saved["mean"], dtype=torch.float64), torch.tensor(mean_residual(training, hvd.size()), dtype=torch.float64)
    largest = max(before.abs().max().item(), slot(training.compression, "residual").abs().max().item(), 1e-30)
    training.train(FIRST, FIRST + 2)
    w = weights(training.model, training.compression)
    parts = training.compression.transport.allgather(w, "weights", [w.numel()] * hvd.size()).wait()
    copies = len(shares(hvd.rank(), hvd.size(), saved_size)) == 1
    return {"change": (after - before).abs().max().item() / largest, "copies": copies, "equal": all(torch.equal(p, w) for p in parts)}


def main() -> None:
    backend, task, root, *sizes = sys.argv[1:]
    hvd = importlib.import_module(BACKENDS[backend])
    hvd.init()
    warnings.simplefilter("ignore")
    rank, size = hvd.rank(), hvd.size()
    task, _, which = task.partition("-")
    for saved_size in [int(s) for s in sizes] or [size]:
        folder = Path(root) / f"{backend}-{saved_size}"
        standing = {"": CASES, "some": (), "kinds": PAIRS if saved_size == size == 2 else KINDS}[which]
        cases = [c for c in CASES if c in standing or c.name in SOME]
        results: dict[str, Any] = {}
        if task == "save":
            results = {case.name: save(hvd, case, folder) for case in cases}
            name = f"save-{size}-rank{rank}.json"
        else:
            before = json.loads((folder / f"save-{saved_size}-rank{rank if saved_size == size else 0}.json").read_text())
            for case in cases:
                saved = before[case.name]
                results[case.name] = resume(hvd, case, folder, saved) if saved_size == size else resize(hvd, case, folder, saved, saved_size)
            name = f"load-{size}-rank{rank}.json"
        (folder / name).write_text(json.dumps(results))
    if hvd.rank() == 0:
        print("done", flush=True)


if __name__ == "__main__":
    main()
