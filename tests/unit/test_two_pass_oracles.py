"""DoubleSqueeze, dist-EF-SGD and CompSkip line by line in plain tensors: workers' and servers' residuals, and x (docs/algorithms.md §2, §4, §5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.compressors import Sign, TopK
from hvd_ecsgd.exchange import Every
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL
from tests.problems import slot
from tests.unit.test_def_oracles import LRS, D, N, quadratic

PIECE = 8
"""N pieces of this length are D elements."""


def top_2(v: torch.Tensor) -> torch.Tensor:
    """The two largest entries of each piece: `TopK(4)`."""
    pieces = v.view(N, PIECE)
    return torch.zeros_like(pieces).scatter(1, (chosen := pieces.abs().topk(2).indices), pieces.gather(1, chosen)).flatten()


def signs(v: torch.Tensor) -> torch.Tensor:
    """‖v‖₁/d·sign(v) of each piece: `Sign()`."""
    pieces = v.view(N, PIECE)
    return torch.where(pieces < 0, -1.0, 1.0).mul(pieces.abs().mean(1, keepdim=True)).flatten()


@dataclass(frozen=True)
class Recursion:
    """What a method does. `after`: momentum and weight decay act on D, as the optimizer's. `falls`: the unit follows η down in front of them too."""

    worker: Callable[[torch.Tensor], torch.Tensor] = top_2
    server: Callable[[torch.Tensor], torch.Tensor] = top_2
    after: bool = False
    nesterov: bool = False
    falls: bool = False
    workers_send: Callable[[int, int], bool] = lambda t, i: True
    server_sends: Callable[[int], bool] = lambda t: True


Step = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]
"""x, all e_i, E."""


def by_hand(r: Recursion, mu: float, wd: float) -> list[Step]:
    x, server, after = torch.ones(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    e, m = [torch.zeros_like(x)] * N, [torch.zeros_like(x)] * N
    history, before = [], LRS[0]
    for t, lr in enumerate(LRS):
        unit = max(lr, before) if r.after and mu and not r.falls else lr
        total = before / unit * server
        for i in range(N):
            h, b = quadratic(i)
            g = h @ x - b
            if not r.after:
                g = g + wd * x
                m[i] = mu * m[i] + g
                g = g + mu * m[i] if r.nesterov else m[i]
            e[i] = g + before / unit * e[i]
            if r.workers_send(t, i):
                sent = r.worker(e[i])
                total, e[i] = total + sent / N, e[i] - sent
        d = r.server(total) if r.server_sends(t) else torch.zeros_like(x)
        server = total - d
        if r.after:
            d = d + wd * x
            after = mu * after + d
            d = d + mu * after if r.nesterov else after
        x, before = x - lr * d, unit
        history.append((x, list(e), server))
    return history


def trained(make: Callable[[], Any], mu: float, wd: float, nesterov: bool = False) -> list[Step]:
    def worker(transport: Transport) -> list[Any]:
        x = torch.nn.Parameter(torch.ones(D, dtype=torch.float64))
        sgd = torch.optim.SGD([x], lr=LRS[0], momentum=mu, weight_decay=wd, nesterov=nesterov)
        optimizer = DistributedOptimizer(sgd, [("x", x)], make(), transport=transport)
        h, b = quadratic(transport.rank)
        seen = []
        for lr in LRS:
            optimizer.param_groups[0]["lr"] = lr
            x.grad = h @ x.detach() - b
            optimizer.step()
            server = optimizer.compression.state_dict()["parameters"]["x"]["server_residual"]
            seen.append((x.detach().clone(), slot(optimizer.compression, "residual"), server))
        return seen

    return [(ranks[0][0], [e for _, e, _ in ranks], torch.cat([s for *_, s in ranks])) for ranks in zip(*run_simulated(N, worker), strict=True)]


def difference(a: list[Step], b: list[Step]) -> float:
    return max((p - q).abs().max().item() for s, t in zip(a, b, strict=True) for p, q in zip([s[0], *s[1], s[2]], [t[0], *t[1], t[2]], strict=True))


METHODS: dict[str, tuple[Callable[[], Any], Recursion]] = {
    "DoubleSqueeze": (lambda: Compression.double_squeeze(TopK(4), **ALL), Recursion(after=True)),
    "DoubleSqueeze, two compressors": (lambda: Compression.double_squeeze(TopK(4), Sign(), **ALL), Recursion(server=signs, after=True)),
    "dist-EF-SGD": (lambda: Compression.dist_ef_sgd(**ALL), Recursion(signs, signs)),
    "dist-EF-SGD, top-k": (lambda: Compression.dist_ef_sgd(TopK(4), **ALL), Recursion()),
    "workers in turns": (lambda: Compression.comp_skip(None, None, TopK(4), **ALL), Recursion(workers_send=lambda t, i: (t - i) % 2 == 0)),
    "the servers": (lambda: Compression.comp_skip(Every(1), Every(3), **ALL), Recursion(signs, signs, server_sends=lambda t: t % 3 == 0)),
    "both": (
        lambda: Compression.comp_skip(Every(3), Every(2, offset=1), TopK(4), Sign(), **ALL),
        Recursion(top_2, signs, workers_send=lambda t, i: (t - i) % 3 == 0, server_sends=lambda t: t % 2 == 1),
    ),
}


@pytest.mark.parametrize(("mu", "wd", "nesterov"), [(0.0, 0.0, False), (0.9, 0.01, False), (0.9, 0.01, True)], ids=["plain", "momentum", "nesterov"])
@pytest.mark.parametrize("name", METHODS)
def test_the_recursion(name: str, mu: float, wd: float, nesterov: bool) -> None:
    """With η changing, every quantity of every worker after each step; with another η's ratio, or another momentum, it is another (controls)."""
    make, recursion = METHODS[name]
    expected = by_hand(Recursion(**{**vars(recursion), "nesterov": nesterov}), mu, wd)
    ours = trained(make, mu, wd, nesterov)
    assert difference(ours, expected) < 1e-12
    assert difference(ours, by_hand(Recursion(**{**vars(recursion), "nesterov": nesterov}), mu + 0.05, wd)) > 1e-4
    if mu:
        assert difference(ours, by_hand(Recursion(**{**vars(recursion), "nesterov": not nesterov}), mu, wd)) > 1e-4
        assert difference(ours, by_hand(Recursion(**{**vars(recursion), "nesterov": nesterov, "after": not recursion.after}), mu, wd)) > 1e-4
    if mu and recursion.after:
        assert difference(ours, by_hand(Recursion(**{**vars(recursion), "nesterov": nesterov, "falls": True}), mu, wd)) > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_the_recursions_differ(name: str) -> None:
    """Control: no method's run is another's recursion."""
    ours = trained(METHODS[name][0], 0.9, 0.01)
    for other, (_, recursion) in METHODS.items():
        if other != name:
            assert difference(ours, by_hand(recursion, 0.9, 0.01)) > 1e-4, other
