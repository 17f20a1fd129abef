"""CompSkip: what silent workers and servers keep is not lost, and nobody waits for them (docs/algorithms.md §4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, DistributedOptimizer
from hvd_ecsgd.compressors import Identity, RandomBlock, Sign, TopK
from hvd_ecsgd.exchange import Bernoulli, CompSkip, Every, NormBased, Rounds, SkipAllReduce, TwoPass
from hvd_ecsgd.feedback import DistEFSGD, ErrorFeedback, LocalMomentum
from hvd_ecsgd.protocols import StepContext
from hvd_ecsgd.reproduce.skips import limit
from hvd_ecsgd.segments import Key
from hvd_ecsgd.transport import Transport, run_simulated
from tests.problems import batch, flat, mlp, same_bits
from tests.recursions import ALL, CONSTANT, LRS, N, trajectory, violation
from tests.wrapping import Wrapping

NAN = float("nan")


METHODS: dict[str, Callable[[], Any]] = {
    "in turns": lambda: Compression.comp_skip(**ALL),
    "every third, together": lambda: Compression.comp_skip(Every(3, offset=0), **ALL),
    "in rounds": lambda: Compression.comp_skip(Rounds(2), Rounds(2), **ALL),
    "servers only": lambda: Compression.comp_skip(Every(1), Every(2), **ALL),
    "drawn": lambda: Compression.comp_skip(Bernoulli(0.5), Bernoulli(0.6, seed=1), TopK(7), **ALL),
    "drawn, capped": lambda: Compression.comp_skip(Bernoulli(0.2, cap=2), Bernoulli(0.2, cap=1), **ALL),
    "by norm": lambda: Compression.comp_skip(NormBased(64.0), NormBased(16.0), **ALL),
    "by norm and drawn": lambda: Compression.comp_skip(NormBased(64.0), Bernoulli(0.5), **ALL),
    "drawn and by norm": lambda: Compression.comp_skip(Bernoulli(0.5), NormBased(2.0), TopK(7), Identity(), **ALL),
    "dense small ones": lambda: Compression.comp_skip(Bernoulli(0.5), Bernoulli(0.5)),
    "all-reduce": lambda: Compression(RandomBlock(8), DistEFSGD(), SkipAllReduce(Bernoulli(0.5)), **ALL),
}


@pytest.mark.parametrize("lrs", [CONSTANT, LRS], ids=["constant", "changing"])
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_lost(name: str, lrs: Sequence[float]) -> None:
    """y = x − η_{t−1}(E + mean e) is momentum SGD on the mean gradients, whoever was silent; x has the same bits on all ranks."""
    records = trajectory(METHODS[name], lrs, momentum=0.9, nesterov=True, weight_decay=1e-2)
    assert all(same_bits(r[0] for r in ranks) for ranks in records)
    assert violation(records, lrs, nesterov=True, wd=1e-2) < 1e-12


@pytest.mark.parametrize("name", ["in turns", "drawn", "by norm"])
def test_without_the_ratio_of_learning_rates_it_is_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control."""
    monkeypatch.setattr(StepContext, "carry", property(lambda self: 1.0))
    assert violation(trajectory(METHODS[name], LRS, momentum=0.9), LRS) > 1e-3


@pytest.mark.parametrize("name", ["in turns", "drawn", "by norm", "all-reduce"])
def test_with_the_next_learning_rate_it_is_lost(name: str) -> None:
    """Control: what waits is worth the learning rate of the last step, also where that step was skipped."""
    records = trajectory(METHODS[name], LRS, momentum=0.9)
    assert violation(records, LRS) < 1e-12
    assert violation(records, LRS, unit=(*LRS[1:], LRS[-1])) > 1e-3


def test_never_skipping_is_dist_ef_sgd() -> None:
    """`Every(1)` on both sides, and `Bernoulli(1)`: bit for bit, bytes too. With C' = b·C for a skipping worker (control) it is not."""

    def run(make: Callable[[], Any]) -> Any:
        def worker(transport: Transport) -> Any:
            model = mlp()
            optimizer = trained(model, make(), transport, range(6))
            return flat(model.parameters()), optimizer.compression.traffic

        return run_simulated(N, worker)[0]

    x, traffic = run(lambda: Compression.dist_ef_sgd(**ALL))
    for policy in (Every(1), Bernoulli(1.0), NormBased(0.0), Bernoulli(0.1, cap=0)):
        same, same_traffic = run(lambda policy=policy: Compression.comp_skip(policy, policy, **ALL))
        assert torch.equal(x, same)
        assert traffic == same_traffic
    other, other_traffic = run(lambda: Compression.comp_skip(**ALL))
    assert not torch.equal(x, other)
    assert other_traffic.payload < traffic.payload


@dataclass(frozen=True)
class Gated(Wrapping):
    """C′ = b·C: nothing of C(v) is sent, and all of v stays, where `policy` says so."""

    inner: Any
    policy: Any

    def extract_(self, buffer: torch.Tensor, segments: Any, key: Key) -> torch.Tensor:
        sends = self.policy.sends(Key(key.seed, key.step, key.rank, "worker"), NAN, NAN)
        return self.inner.extract_(buffer if sends else torch.zeros_like(buffer), segments, key)


@pytest.mark.parametrize("policy", [Every(2), Every(3), Bernoulli(0.4)], ids=repr)
def test_skipping_is_a_compressor_that_sends_nothing(policy: Any) -> None:
    """Workers that skip are dist-EF-SGD with C′ = b·C, bit for bit; with C (control) they are not."""
    make: dict[str, Callable[[], Any]] = {
        "skip": lambda: Compression.comp_skip(policy, Every(1), TopK(5), Sign(), **ALL),
        "gated": lambda: Compression.dist_ef_sgd(Gated(TopK(5), policy), Sign(), **ALL),
        "C": lambda: Compression.dist_ef_sgd(TopK(5), Sign(), **ALL),
    }
    x = {name: trajectory(m, LRS, momentum=0.9)[-1][0][0] for name, m in make.items()}
    assert torch.equal(x["skip"], x["gated"])
    assert not torch.equal(x["skip"], x["C"])


def trained(model: Any, compression: Any, transport: Transport, steps: Any, optimizer: Any = None, bad: Any = None, **sgd: Any) -> Any:
    """Train; `bad` = (step, rank) puts a NaN there."""
    sgd = sgd or {"momentum": 0.9}
    dtype = next(model.parameters()).dtype
    if optimizer is None:
        inner = torch.optim.SGD(model.parameters(), lr=0.05, **sgd)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), compression, transport=transport)
    for t in steps:
        optimizer.zero_grad()
        x, y = batch(transport.rank, t, dtype)
        (torch.nn.functional.cross_entropy(model(x), y) * (NAN if bad == (t, transport.rank) else 1.0)).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("q", [0.25, 0.5, 1.0])
def test_bytes_fall_as_q(q: float) -> None:
    """Payload of workers and servers, over 60 steps, is q of the whole to the byte counted by draws; what was skipped is visible."""
    steps = 60

    def worker(transport: Transport) -> Any:
        return trained(mlp(), Compression.comp_skip(Bernoulli(q), Bernoulli(q), **ALL), transport, range(steps)).compression.traffic

    def full(transport: Transport) -> Any:
        return trained(mlp(), Compression.dist_ef_sgd(**ALL), transport, range(steps)).compression.traffic

    whole = run_simulated(N, full)
    for rank, traffic in enumerate(run_simulated(N, worker)):
        alarms = traffic.payload + traffic.skipped - whole[rank].payload
        assert 0 <= alarms <= steps * 2, "one byte per bucket and step with a skip"
        assert (traffic.payload - alarms) / whole[rank].payload == pytest.approx(q, abs=0.15)
        assert (traffic.skipped == 0) == (q == 1.0)


def test_a_worker_sends_when_its_policy_says() -> None:
    """Counted where it is handed to the transport: silent ones hand over no rows, and where nobody sends there is no collective."""
    calls: list[list[tuple[str, int]]] = [[] for _ in range(N)]

    def worker(transport: Transport) -> None:
        alltoall, mine = transport.alltoall, calls[transport.rank]

        def spy(t: torch.Tensor, splits: Any, name: str, received: Any = None) -> Any:
            assert received is not None, "sizes are known: no round to exchange them"
            mine.append((name, t.numel()))
            return alltoall(t, splits, name, received)

        transport.alltoall = spy  # type: ignore[method-assign]
        trained(mlp(), Compression.comp_skip(Every(4), **ALL), transport, range(8))

    run_simulated(N, worker)
    for rank, mine in enumerate(calls):
        assert len(mine) == 6, "steps 3 and 7 have no sender"
        assert [t for t, (_, rows) in enumerate(mine) if rows] == [rank, rank + 3]


def test_workers_by_norm_skip_and_do_not_starve() -> None:
    """A large threshold skips up to the cap; a small one sends always (control)."""

    def sent(policy: Any) -> Any:
        def worker(transport: Transport) -> Any:
            c = trained(mlp(), Compression.comp_skip(policy, Every(1), **ALL), transport, range(24)).compression
            return c.traffic.skipped, max(int(e["skips"][transport.rank]) for e in c.state_dict()["parameters"].values())

        return run_simulated(N, worker)

    for (many, most), (some, _), (none, at_zero) in zip(sent(NormBased(1e9, cap=3)), sent(NormBased(64.0)), sent(NormBased(0.0)), strict=True):
        assert many > some > none == 0
        assert 0 <= most <= 3
        assert at_zero == 0


@pytest.mark.parametrize("rule", [DistEFSGD(), ErrorFeedback(), LocalMomentum(0.0)], ids=repr)
@pytest.mark.parametrize(("rate", "gradient", "sends"), [(1.0, 1.0, True), (0.1, 1.0, False), (0.1, 10.0, True)])
def test_what_waits_is_weighed_by_the_learning_rate(rate: float, gradient: float, sends: bool, rule: Any) -> None:
    """The same gradient at a tenth of the rate moves the model by a hundredth of the energy, less than it has moved by of late. In units of
    updates the rate is in it already."""
    x = torch.nn.Parameter(torch.zeros(4))
    method = Compression(Identity(), rule, CompSkip(NormBased(1.0), Every(1)), **ALL)
    optimizer = DistributedOptimizer(torch.optim.SGD([x], lr=1.0), [("x", x)], method)
    for lr, g in ((1.0, 1.0), (rate, gradient)):
        optimizer.param_groups[0]["lr"] = lr
        x.grad = torch.full((4,), g)
        optimizer.step()
    assert (optimizer.compression.traffic.skipped == 0) == sends


def second_step(worker: Any, server: Any, factors: tuple[float, float]) -> list[Any]:
    """Two workers, two pieces of 8. A gradient of 10 in the first piece and 1 in the second, then these times `factors`. By rank: which pieces moved
    then, bytes skipped, and the state."""

    def run(transport: Transport) -> Any:
        x = torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
        compression = Compression.comp_skip(worker, server, Identity(), **ALL)
        optimizer = DistributedOptimizer(torch.optim.SGD([x], lr=1.0), [("x", x)], compression, transport=transport)
        before = x.detach().clone()
        for first, second in ((1.0, 1.0), factors):
            before = x.detach().clone()
            x.grad = torch.tensor([10.0 * first] * 8 + [second] * 8, dtype=torch.float64)
            optimizer.step()
        moved = [bool((x.detach() != before)[piece].all()) for piece in (slice(8), slice(8, 16))]
        return moved, optimizer.compression.traffic.skipped, optimizer.compression.state_dict()["parameters"]["x"]

    return run_simulated(2, run)


def test_movement_is_a_running_mean_of_the_whole_and_of_ones_own_piece() -> None:
    """A tenth of each step's square is added to nine tenths of the mean."""
    for rank, (_, _, state) in enumerate(second_step(NormBased(0.0), NormBased(0.0), (2.0, 3.0))):
        pieces = [0.1 * (0.9 * 800 + 4 * 800), 0.1 * (0.9 * 8 + 9 * 8)]
        assert state["movement"].flatten().tolist() == pytest.approx([sum(pieces), pieces[rank]])


def test_servers_look_at_their_own_piece_and_workers_at_the_whole() -> None:
    """What waits in the second piece, 8, is large against how that piece has moved (.8), small against the whole (80.8). Thresholds, and smaller
    gradients, for which they skip, are the controls."""
    for moved, skipped, _ in second_step(Every(1), NormBased(9.0), (1.0, 1.0)):
        assert moved == [True, True]
        assert skipped == 0
    for moved, skipped, _ in second_step(Every(1), NormBased(11.0), (1.0, 1.0)):
        assert moved == [False, False]
        assert skipped == 64
    for moved, skipped, _ in second_step(NormBased(9.0), Every(1), (1.0, 1.0)):
        assert moved == [True, True]
        assert skipped == 0
    # 50.5 in all: less than the whole has moved by, more than the second piece has.
    for moved, skipped, _ in second_step(NormBased(1.0), Every(1), (0.25, 0.25)):
        assert moved == [False, False]
        assert skipped == 128


def test_where_some_servers_are_silent_their_pieces_stand_still() -> None:
    """And keep what they were sent; the others move."""
    results = second_step(Every(1), NormBased(1.0), (1.0, 0.1))
    for moved, _, _ in results:
        assert moved == [True, False]
    assert [skipped for _, skipped, _ in results] == [0, 64]
    assert not results[0][2]["server_residual"].any()
    assert results[1][2]["server_residual"].tolist() == pytest.approx([0.1] * 8)


def test_rounds_are_larger_batches_where_nothing_is_compressed() -> None:
    """Uncompressed and without momentum x moves in the last of three steps, by the sum of three gradients that were taken at one point. In turns
    (control) it does not."""

    def moved(policy: Any) -> list[bool]:
        records = trajectory(lambda: Compression.comp_skip(policy, policy, Identity(), **ALL), CONSTANT)
        x = [ranks[0][0] for ranks in records]
        found = []
        for t in (0, 3):
            gradients = sum(record[1] for ranks in records[t : t + 3] for record in ranks) / N
            stands = torch.equal(x[t], x[t + 1]) and torch.equal(x[t], x[t + 2])
            found.append(stands and torch.allclose(x[t + 3], x[t] - CONSTANT[0] * gradients, rtol=0, atol=1e-14))
        return found

    assert moved(Rounds(3)) == [True, True]
    assert moved(Every(3)) == [False, False]


def test_rounds_of_gradients_taken_ahead_are_local_steps() -> None:
    """A worker that is silent, and takes gradients at x − e, moves on by itself: bit for bit `LocalMomentum`'s `period`. Without λ it does not
    (control)."""

    def ends(rule: Any, exchange: Any) -> torch.Tensor:
        return trajectory(lambda: Compression(Sign(), rule, exchange, **ALL), LRS[:6], momentum=0.9)[-1][0][0]

    local = ends(LocalMomentum(1.0, period=3), TwoPass())
    assert torch.equal(local, ends(LocalMomentum(1.0), CompSkip(Rounds(3), Rounds(3))))
    assert not torch.equal(local, ends(LocalMomentum(0.0), CompSkip(Rounds(3), Rounds(3))))


@dataclass(frozen=True)
class Share(Identity):
    """C(v) = δ·v."""

    part: float = 0.6

    @property
    def lossless(self) -> bool:
        return False

    def extract_(self, buffer: torch.Tensor, segments: Any, key: Key) -> torch.Tensor:
        payload = segments.empty() if segments.numel < buffer.numel() else buffer.clone()
        if segments.numel < buffer.numel():
            payload.copy_(torch.cat(segments.views(buffer)))
        payload *= self.part
        for view, sent in zip(segments.views(buffer), payload.split([s.numel for s in segments]), strict=True):
            view -= sent
        return payload


SKIPS: dict[str, tuple[Any, Any, float]] = {  # workers' policy, the server's, and momentum, as in the table of `hvd-ecsgd reproduce skips`
    "both every 2nd, workers in turns": (Every(2), Rounds(2), 0.9),
    "together every 2nd": (Rounds(2), Rounds(2), 0.9),
    "together every 4th": (Rounds(4), Rounds(4), 0.0),
}


@pytest.mark.parametrize("name", SKIPS)
def test_how_large_a_rate_skips_bear(name: str) -> None:
    """On a quadratic, C(v) = .6·v: at three quarters of the limit of the reproduction's table x goes to 0, at half as much again (control) away."""
    workers, server, mu = SKIPS[name]
    pattern = [[int(workers.sends(Key(0, t, r), NAN, NAN)) for r in range(2)] for t in range(4)]
    answers = [int(server.sends(Key(0, t, None), NAN, NAN)) for t in range(4)]
    largest = limit(pattern, answers, mu, 0.6, 0.0)

    def ends(rate: float) -> float:
        def worker(transport: Transport) -> float:
            x = torch.nn.Parameter(torch.ones(16, dtype=torch.float64))
            method = Compression.comp_skip(workers, server, Share(), **ALL)
            sgd = torch.optim.SGD([x], lr=rate * (1 - mu), momentum=mu)
            optimizer = DistributedOptimizer(sgd, [("x", x)], method, transport=transport)
            for _ in range(160):
                x.grad = x.detach().clone()
                optimizer.step()
            return float(x.detach().abs().max())

        return run_simulated(2, worker)[0]

    assert ends(0.75 * largest) < 0.3
    assert ends(1.5 * largest) > 3


def test_caps_bound_the_skips_in_a_row() -> None:
    """Bernoulli(0.02) would be silent for long; with a cap of 2 every third step is sent, on every rank alike."""

    def worker(transport: Transport) -> Any:
        model = mlp()
        compression = Compression.comp_skip(Bernoulli(0.02, cap=2), Every(1), **ALL)
        optimizer, skips = trained(model, compression, transport, []), []
        for t in range(12):
            trained(model, None, transport, [t], optimizer)
            skips.append(next(iter(optimizer.compression.state_dict()["parameters"].values()))["skips"])
        return torch.stack(skips)

    results = run_simulated(N, worker)
    assert same_bits(results)
    assert results[0][:, :N].max() == 2
    assert results[0][:, N].max() == 0


NEVER = 1e-9


CAPPED: dict[str, tuple[Any, list[int], list[int]]] = {  # the skips in a row after each step: of a worker, and of the server
    "drawn": (CompSkip(Bernoulli(NEVER, cap=1), Bernoulli(NEVER, cap=3)), [1, 0, 1, 0, 1, 0, 1, 0], [1, 2, 3, 0, 1, 2, 3, 0]),
    "in rounds": (CompSkip(Rounds(3), Rounds(10**6, cap=1)), [1, 2, 0, 1, 2, 0, 1, 2], [1, 0, 1, 0, 1, 0, 1, 0]),
    "in turns": (CompSkip(Every(10**6, offset=-1, cap=3), Every(10**6, offset=-1, cap=0)), [1, 2, 3, 0, 1, 2, 3, 0], [0] * 8),
    "by norm": (CompSkip(NormBased(1e30, cap=2), NormBased(1e30, cap=1)), [0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 0, 1, 0, 1, 0, 1]),
    "all-reduce": (SkipAllReduce(Bernoulli(NEVER, cap=2)), [1, 2, 0, 1, 2, 0, 1, 2], [1, 2, 0, 1, 2, 0, 1, 2]),
}


@pytest.mark.parametrize("what", CAPPED)
def test_the_step_after_so_many_skips_is_sent(what: str) -> None:
    """By policies that send at most once (of nothing the norms are large enough); each side counts its own skips against its own cap."""
    exchange, workers, server = CAPPED[what]

    def worker(transport: Transport) -> Any:
        x = torch.nn.Parameter(torch.zeros(24, dtype=torch.float64))
        method = Compression(Identity(), DistEFSGD(), exchange, **ALL)
        optimizer, counted = DistributedOptimizer(torch.optim.SGD([x], lr=0.1), [("x", x)], method, transport=transport), []
        for _ in workers:
            x.grad = torch.ones_like(x)
            optimizer.step()
            row = optimizer.compression.state_dict()["parameters"]["x"]["skips"].flatten().tolist()
            counted.append((row[transport.rank if len(row) > 1 else 0], row[-1]))
        return counted

    for counted in run_simulated(2, worker):
        assert counted == list(zip(workers, server, strict=True))


def test_what_a_silent_step_costs() -> None:
    """A byte for each other rank, which tells of an inf or NaN; the workers' payloads are not sent, the servers' answers are, if they answer."""

    def worker(transport: Transport) -> Any:
        seen = []
        for server in (Every(1), Every(2, offset=1)):
            x = torch.nn.Parameter(torch.zeros(24))
            compression = Compression.comp_skip(Every(2, offset=1), server, Identity(), **ALL)
            optimizer = DistributedOptimizer(torch.optim.SGD([x], lr=0.1), [("x", x)], compression, transport=transport)
            x.grad = torch.ones(24)
            optimizer.step()
            seen.append((optimizer.compression.traffic.payload, optimizer.compression.traffic.sent, optimizer.compression.traffic.skipped))
        return seen

    for answered, silent in run_simulated(N, worker):
        assert answered == (1 + 32, 2 * 1 + 2 * 32, 96)
        assert silent == (1, 2 * 1, 96 + 32)


@pytest.mark.parametrize("name", METHODS)
def test_these_methods_do_skip(name: str) -> None:
    """Control of all tests here: each method is silent now and then, and not always."""
    results = run_simulated(N, lambda transport: trained(mlp(), METHODS[name](), transport, range(8)).compression.traffic)
    assert sum(traffic.skipped for traffic in results) > 0
    assert all(traffic.payload > 100 for traffic in results)


# -- undoing and saving --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:a gradient or a payload held an inf or NaN:RuntimeWarning")
@pytest.mark.parametrize("bad_step", [3, 4, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_bad_step_is_undone_everywhere_and_a_resumed_run_is_the_run(name: str, bad_step: int) -> None:
    """Also when the worker with the NaN was silent, or the servers were. Counters and movement are back, too."""

    def worker(transport: Transport) -> Any:
        model, other = mlp(torch.float64), mlp(torch.float64)
        optimizer = trained(model, METHODS[name](), transport, range(bad_step))
        before, x = optimizer.compression.state_dict(), flat(model.parameters())
        trained(model, None, transport, [bad_step], optimizer, bad=(bad_step, 1))
        after = optimizer.compression.state_dict()
        assert torch.equal(x, flat(model.parameters()))
        for parameter, entry in before["parameters"].items():
            for slot, value in entry.items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(after["parameters"][parameter][slot], value, rtol=1e-12, atol=1e-13)
        other.load_state_dict(model.state_dict())
        resumed = trained(other, METHODS[name](), transport, [])
        resumed.compression.load_state_dict(after)
        trained(model, None, transport, range(bad_step + 1, bad_step + 6), optimizer)
        trained(other, None, transport, range(bad_step + 1, bad_step + 6), resumed)
        return flat(model.parameters()), flat(other.parameters()), x, optimizer.compression.undone_steps

    results = run_simulated(N, worker)
    assert same_bits(r[0] for r in results)
    for went_on, resumed, x, undone in results:
        assert undone == 1
        assert torch.equal(went_on, resumed)
        assert not torch.equal(went_on, x), "control: training went on"


def test_counters_are_part_of_the_state() -> None:
    """Control of the resumed run: without them the caps fall on other steps."""

    def worker(transport: Transport) -> Any:
        finals = []
        for forget in (False, True):
            model, other = mlp(torch.float64), mlp(torch.float64)
            make = lambda: Compression.comp_skip(Bernoulli(0.01, cap=2), **ALL)  # noqa: E731
            optimizer = trained(model, make(), transport, range(4))
            state = optimizer.compression.state_dict()
            if forget:
                for entry in state["parameters"].values():
                    entry["skips"].zero_()
            other.load_state_dict(model.state_dict())
            resumed = trained(other, make(), transport, [])
            resumed.compression.load_state_dict(state)
            trained(model, None, transport, range(4, 8), optimizer)
            trained(other, None, transport, range(4, 8), resumed)
            finals.append(torch.equal(flat(model.parameters()), flat(other.parameters())))
        return finals

    assert run_simulated(N, worker) == [[True, False]] * N
