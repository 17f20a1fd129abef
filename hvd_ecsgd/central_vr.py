"""Variance reduction with a table of gradients, and one exchange in an epoch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .arguments import check_integer
from .compression import AnyCompression, Compression
from .errors import CompressionError
from .gradient_exchange import GradientExchange
from .kernels import all_finite
from .transport import Transport
from .verdicts import known

__all__ = ["CentralVR"]


class CentralVR(torch.optim.Optimizer):
    """x_i ← x_i − η·(g − G_k + ḡ), G_k ← g with g = ∇f_k(x_i) of this worker's batch k; and after an epoch, in `exchange`, x_i ← mean_i x_i and
    ḡ ← mean_i mean_k G_k. De, Goldstein 2016: CentralVR, the synchronous form; what compression does in it is a *reconstruction*.

        optimizer = CentralVR(model.named_parameters(), lr=0.1, batches=len(batches), compression=Compression.random_block(8), transport=transport)
        for epoch in range(20):
            for k in torch.randperm(len(batches)).tolist():       # the same data under the same number in every epoch
                optimizer.zero_grad()
                loss(model, batches[k]).backward()
                optimizer.step(k)
            optimizer.exchange()                                   # collective

    With a constant η it converges to the minimum, where SGD stays as far from it as the batches' gradients differ there. It does so uncompressed, and
    with methods that take the same places on all workers (`random_block`, `fp16` with feedback), as what workers differ by cancels in their mean. It
    stays at about SGD's distance with others (`top_k`, `double_squeeze`).

    A batch that is met for the first time gives a plain step of SGD. Workers may have different numbers of batches; each worker has the same weight.
    Batches whose gradient holds an inf or NaN are left out, with a warning the first time.

    What travels is x − x_i and mean_k G_k − ḡ, in one exchange of `compression`: any method whose update the loop applies and that needs no learning
    rate. With error feedback nothing of either is lost. `compression` (the attribute) is the bound method, with `state_dict` and `traffic`; beside it
    `state_dict` of this optimizer is what a run needs to go on from an exchange.

    Memory beside parameters and gradients: `batches` + 2 times the parameters, and what the method keeps, for two models.
    Raises `CompressionError` for `batches` < 1 or no integer, a batch that is not in 0 … batches − 1, and methods that apply the update themselves.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        lr: float,
        batches: int,
        compression: AnyCompression = Compression.none,
        transport: Transport | None = None,
    ) -> None:
        check_integer(batches, "batches", "how many batches this worker has, an integer ≥ 1", least=1)
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.batches = batches
        self._warned = False
        super().__init__([p for _, p in named], {"lr": lr})
        self._kept: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        for _, p in named:
            table = torch.zeros((batches, *p.shape), dtype=p.dtype, device=p.device)
            seen = torch.zeros(batches, dtype=p.dtype, device=p.device)
            self._kept[p] = {"start": p.detach().clone(), "mean": torch.zeros_like(p), "table": table, "seen": seen}
            self.state[p] = dict(self._kept[p])
        self._names = {p: name for name, p in named}
        # Two things of each parameter's shape travel; the exchange is told of them as of parameters.
        travels = [
            (name + suffix, torch.nn.Parameter(self._kept[p][slot])) for suffix, slot in (("", "start"), (".gradient", "mean")) for name, p in named
        ]
        self._exchange = GradientExchange(travels, compression, transport)
        self.compression = self._exchange.compression

    @torch.no_grad()
    def step(self, batch: int) -> None:  # type: ignore[override]
        """Move this worker's parameters by their gradients, which are those of its batch `batch`. Nothing is sent."""
        check_integer(batch, "batch", f"the number of a batch, an integer from 0 to {self.batches - 1}", least=0, most=self.batches - 1)
        parameters = [(p, p.grad, group["lr"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not known([all_finite(g) for _, g, _ in parameters]):
            if not self._warned:
                warnings.warn(
                    f"CentralVR: the gradient of batch {batch} holds an inf or NaN; such batches are left out.", RuntimeWarning, stacklevel=2
                )
            self._warned = True
            return
        for p, g, lr in parameters:
            kept = self.state[p]
            stored = kept["table"][batch]
            if kept["seen"][batch]:
                p.add_(stored, alpha=lr).sub_(kept["mean"], alpha=lr)
            p.sub_(g, alpha=lr)
            stored.copy_(g)
            kept["seen"][batch] = 1.0

    @torch.no_grad()
    def exchange(self) -> None:
        """Meet the other workers: all have the same x and ḡ afterwards. Collective.

        When some worker's models hold an inf or NaN, all go back to x as it was after the last exchange, with a warning.
        """
        gone: dict[str, torch.Tensor] = {}
        for p, name in self._names.items():
            kept = self.state[p]
            gone[name] = kept["start"] - p
            gone[f"{name}.gradient"] = kept["table"].sum(0).div_(kept["seen"].sum().clamp_(min=1.0)).sub_(kept["mean"])
        means = self._exchange.reduce(gone)
        for p, name in self._names.items():
            kept = self.state[p]
            if name in means:
                kept["start"].sub_(means[name])
            if f"{name}.gradient" in means:
                kept["mean"].add_(means[f"{name}.gradient"])
            p.copy_(kept["start"])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned after an exchange, on a worker with as many batches."""
        for entry in state_dict["state"].values():
            if (saved := len(entry["seen"])) != self.batches:
                raise CompressionError(f"CentralVR.load_state_dict(): the state is that of {saved} batches, and there are {self.batches} here.")
        super().load_state_dict(dict(state_dict))
        for p, kept in self._kept.items():
            for slot, tensor in kept.items():
                self.state[p][slot] = tensor.copy_(self.state[p][slot])
