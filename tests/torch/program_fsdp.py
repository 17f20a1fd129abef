"""One rank of four: FSDP2's hook on a mesh of 2 replicas × 2 shards.  program_fsdp.py FILE"""

from __future__ import annotations

import copy
import io
import sys
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer, SequenceError, fsdp
from hvd_ecsgd.transport import Transport, run_simulated
from tests.cases import ALL
from tests.problems import batch, mlp
from tests.torch.meeting import meet

STEPS = 8
RATES = (0.05, 0.1, 0.05, 0.05, 0.1, 0.1, 0.02, 0.02)
METHODS = {
    "none": lambda: Compression.none,
    "random_block": lambda: Compression.random_block(8, **ALL),
    "top_k": lambda: Compression.top_k(10, **ALL),
    "top_k-block": lambda: Compression.top_k(10, block=64, **ALL),
    "double_squeeze": lambda: Compression.double_squeeze(**ALL),
    "power_sgd": lambda: Compression.power_sgd(2, **ALL),
    "detached": lambda: Compression.detached(8, **ALL),
    "local_momentum": lambda: Compression.local_momentum(8, **ALL),
    "pef": lambda: Compression.pef(8, **ALL),
}


def sharded(mesh: DeviceMesh) -> torch.nn.Module:
    """20-64-5, the first layer in a group of its own; the last layer's five rows do not divide by two."""
    model = mlp()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def loss_of(model: torch.nn.Module, step: int, rank: int | None = None) -> torch.Tensor:
    x, y = batch(dist.get_rank() if rank is None else rank, step)
    return torch.nn.functional.cross_entropy(model(x), y)


def local(model: torch.nn.Module) -> torch.Tensor:
    tensors: list[Any] = list(model.parameters())
    return torch.cat([t.to_local().detach().flatten() for t in tensors])


def sgd(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.SGD:
    """With a param group for each layer, of which the first one's rate changes."""
    every = list(parameters)
    return torch.optim.SGD([{"params": every[:2]}, {"params": every[2:], "lr": 0.03}], lr=0.1, momentum=0.9)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int] = range(STEPS)) -> torch.Tensor:
    for step in steps:
        optimizer.param_groups[0]["lr"] = RATES[step]
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return local(model)


def made(mesh: DeviceMesh, compression: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer, fsdp.FSDPHook]:
    model = sharded(mesh["shard"])
    optimizer = sgd(model.parameters())
    hook = fsdp.register(model, compression, mesh["replicate"])  # type: ignore[arg-type]
    hook.attach(optimizer)
    return model, optimizer, hook


def without_compression_it_is_torchs_own(mesh: DeviceMesh) -> None:
    """Of fully_shard on the mesh of two dimensions, which exchanges between replicas by itself: the same bits. A lossy method is the control."""
    expected = sharded(mesh)
    w = train(expected, sgd(expected.parameters()))
    for compression, same in ((Compression.none, True), (Compression.top_k(10, **ALL), False)):
        model, optimizer, _ = made(mesh, compression)
        assert torch.equal(train(model, optimizer), w) == same


def simulated(mesh: DeviceMesh, make: Any) -> torch.Tensor:
    """This process's shards, trained by two workers in one process, each with the mean gradient of one replica's shards."""
    shards, place = mesh["shard"].size(), mesh["shard"].get_local_rank()
    name = f"shard{place}of{shards}"

    def parts(model: torch.nn.Module, of: str) -> list[torch.Tensor]:
        tensors = [(p.grad if of == "grad" else p.detach()) for p in model.parameters()]
        cut = [list(t.chunk(shards))[place : place + 1] for t in tensors if t is not None]
        return [one.contiguous() for pieces in cut for one in pieces]

    def worker(transport: Transport) -> torch.Tensor:
        whole = mlp()  # follows the shards of all places, so each place is a training of its own here
        mine = [torch.nn.Parameter(t.clone()) for t in parts(whole, "data")]
        names = [f"{n}.{name}" for n, _ in whole.named_parameters()]
        optimizer = DistributedOptimizer(sgd(mine), list(zip(names, mine, strict=True)), make(), transport=transport, bucket_bytes=1 << 20)
        found = torch.empty(0)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATES[step]
            for p, g in zip(mine, gradients[step][transport.rank], strict=True):
                p.grad = None
                (p * g).sum().backward()
            optimizer.step()
            found = torch.cat([p.detach().flatten() for p in mine])
        return found

    # Gradients depend on all shards, so they are noted in the real run, before anything is exchanged.
    model, optimizer, hook = made(mesh, make())
    gradients: list[list[list[torch.Tensor]]] = []

    def note(step: int) -> None:
        mine = [came[n].clone() for n in order]
        everybodys: list[Any] = [None] * mesh["replicate"].size()
        dist.all_gather_object(everybodys, mine, group=mesh["replicate"].get_group())
        gradients.append(everybodys)

    came: dict[str, torch.Tensor] = {}
    order = [s.name for s in hook._shards]
    for shard in hook._shards:
        whole: Any = shard.whole
        hooks = whole._post_accumulate_grad_hooks  # ours goes first, as torch calls them in order
        ours = dict(hooks)
        hooks.clear()
        whole.register_post_accumulate_grad_hook(lambda p, shard=shard: came.__setitem__(shard.name, p.grad.to_local().clone()))
        for one in ours.values():
            whole.register_post_accumulate_grad_hook(one)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATES[step]
        optimizer.zero_grad()
        loss_of(model, step).backward()
        note(step)
        optimizer.step()
    result = run_simulated(mesh["replicate"].size(), worker)[mesh["replicate"].get_local_rank()]
    assert torch.equal(local(model), result), (local(model) - result).abs().max()
    return result


def methods_are_their_simulation(mesh: DeviceMesh) -> None:
    """Two workers in one process, fed with this shard's gradients of the two replicas: the same bits, and other bits of another method."""
    results = {name: simulated(mesh, make) for name, make in METHODS.items()}
    assert len({r.numpy().tobytes() for r in results.values()}) == len(METHODS), "control"


def replicas_agree(mesh: DeviceMesh) -> None:
    model, optimizer, _ = made(mesh, METHODS["double_squeeze"]())
    w = train(model, optimizer)
    others = [torch.empty_like(w) for _ in range(2)]
    dist.all_gather(others, w, group=mesh["replicate"].get_group())
    assert torch.equal(others[0], others[1])


def checkpoints(mesh: DeviceMesh) -> None:
    """By torch.distributed.checkpoint: the rest is the same to the bit; without the residuals it is not (the control)."""
    with tempfile.TemporaryDirectory() if dist.get_rank() == 0 else nullcontext("") as folder:
        where = [folder]
        dist.broadcast_object_list(where)
        model, optimizer, hook = made(mesh, METHODS["double_squeeze"]())
        for group in optimizer.param_groups:
            group["momentum"] = 0.0
        train(model, optimizer, range(4))
        dcp.save({"model": get_model_state_dict(model), "hook": hook.state_dict()}, checkpoint_id=where[0])
        expected = train(model, optimizer, range(4, STEPS))
        for residuals in (True, False):
            model, optimizer, hook = made(mesh, METHODS["double_squeeze"]())
            for group in optimizer.param_groups:
                group["momentum"] = 0.0
            state = {"model": get_model_state_dict(model), "hook": hook.state_dict()}
            dcp.load(state, checkpoint_id=where[0])
            set_model_state_dict(model, state["model"])
            if residuals:
                hook.load_state_dict(state["hook"])
            assert torch.equal(train(model, optimizer, range(4, STEPS)), expected) == residuals
        with pytest.raises(CompressionError, match=r"is not in the state, which holds shard0of4"):
            hook.load_state_dict({"shard0of4.replica0of1": b""})
        dist.barrier()


def other_numbers_of_replicas(mesh: DeviceMesh) -> None:
    """What one, or three, replicas have kept of a shard is cut for two: the mean over replicas stays, and training goes on."""
    model, optimizer, hook = made(mesh, METHODS["double_squeeze"]())
    train(model, optimizer, range(3))
    (own, packed), shard = next(iter(hook.state_dict().items())), hook._key.partition(".")[0]
    state = torch.load(io.BytesIO(packed), weights_only=True)
    with tempfile.TemporaryDirectory() if dist.get_rank() == 0 else nullcontext("") as folder:
        where = [folder]
        dist.broadcast_object_list(where)
        for n in (1, 3):
            olds = [{**copy.deepcopy(state), "rank": r, "size": n} for r in range(n)]
            for r, old in enumerate(olds):
                for name, entry in old["parameters"].items():
                    entry["residual"].fill_(float(r + 1))
                    whole = entry["residual"].numel()
                    length = -(-whole // (8 * n)) * 8
                    entry["server_residual"] = torch.arange(whole, dtype=torch.float32)[r * length : (r + 1) * length]
                    assert name
            place = f"{where[0]}/{n}"
            dcp.save({"hook": {f"{shard}.replica{r}of{n}": _packed(old) for r, old in enumerate(olds)}}, checkpoint_id=place)
            model, optimizer, hook = made(mesh, METHODS["double_squeeze"]())
            filled = {"hook": hook.state_to_load(place)}
            dcp.load(filled, checkpoint_id=place)
            hook.load_state_dict(filled["hook"])
            mine = hook.compression.state_dict()["parameters"]
            mean = torch.tensor([float(mine[name]["residual"].mean()) for name in mine])
            dist.all_reduce(mean, group=mesh["replicate"].get_group())
            assert torch.allclose(mean / 2, torch.full_like(mean, (n + 1) / 2)), (n, mean)
            for name, entry in mine.items():
                pieces: list[Any] = [None, None]
                dist.all_gather_object(pieces, entry["server_residual"], group=mesh["replicate"].get_group())
                whole = torch.cat(pieces)
                assert torch.equal(whole, torch.arange(whole.numel(), dtype=torch.float32)), name
            train(model, optimizer, range(3, 5))
            if n == 3:
                del filled["hook"][f"{shard}.replica1of3"]
                with pytest.raises(CompressionError, match="the parts of all of them"):
                    hook.load_state_dict(filled["hook"])
            dist.barrier()
        assert own == hook._key
        dcp.save({"hook": {"shard0of3.replica0of2": b""}}, checkpoint_id=f"{where[0]}/cut")
        with pytest.raises(CompressionError, match="load with as many shards"):
            hook.state_to_load(f"{where[0]}/cut")
        dist.barrier()


def _packed(state: dict[str, Any]) -> bytes:
    packed = io.BytesIO()
    torch.save(state, packed)
    return packed.getvalue()


def methods_that_apply_the_update(mesh: DeviceMesh) -> None:
    """Evaluating at the averaged point changes nothing of the training, though FSDP2 keeps what it has gathered there; an inf undoes the step; a
    second backward pass, and a gradient that was clipped after it had been exchanged, are errors."""
    found = []
    for evaluates in (False, True):
        model, optimizer, hook = made(mesh, METHODS["detached"]())
        for step in range(STEPS):
            if evaluates and step:
                with torch.no_grad():
                    x = batch(0, 0)[0]
                    outside = model(x) if step % 2 else None
                    with hook.compression.at("averaged"):
                        inside = model(x)
                    assert outside is None or not torch.equal(inside, outside), step
            train(model, optimizer, [step])
        found.append(local(model))
    assert torch.equal(*found), (found[0] - found[1]).abs().max()
    optimizer.zero_grad()
    (loss_of(model, 2) * (float("inf") if dist.get_rank() == 1 else 1)).backward()
    before = local(model)
    optimizer.step()
    assert hook.compression.undone_steps == (mesh["shard"].get_local_rank() >= 0) and torch.allclose(local(model), before)
    loss_of(model, 3).backward()
    with pytest.raises(SequenceError, match="set_requires_gradient_sync"):
        loss_of(model, 3).backward()
    model, optimizer, hook = made(mesh, METHODS["detached"]())
    loss_of(model, 0).backward()
    for p in model.parameters():
        p.grad.mul_(0.5)  # type: ignore[union-attr]
    with pytest.raises(CompressionError, match="gradient"):
        optimizer.step()


def accumulation_and_infs(mesh: DeviceMesh) -> None:
    model, optimizer, hook = made(mesh, METHODS["top_k"]())
    before = local(model)
    sent = hook.compression.traffic.sent
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    loss_of(model, 0).backward()
    assert hook.compression.traffic.sent == sent
    model.set_requires_gradient_sync(True)  # type: ignore[operator]
    loss_of(model, 1).backward()
    assert hook.compression.traffic.sent > sent
    optimizer.step()
    assert not torch.equal(local(model), before)
    with pytest.raises(SequenceError, match="zero_grad"):
        loss_of(model, 2).backward()
    model, optimizer, hook = made(mesh, METHODS["top_k"]())
    train(model, optimizer, range(2))
    before = local(model)
    optimizer.zero_grad()
    (loss_of(model, 2) * (float("inf") if dist.get_rank() == 1 else 1)).backward()
    optimizer.step()
    assert hook.compression.undone_steps == 1 and torch.equal(local(model), before)
    train(model, optimizer, range(3, 5))
    assert local(model).isfinite().all() and not torch.equal(local(model), before)


def wrong_use_is_told(mesh: DeviceMesh) -> None:
    replicate = mesh["replicate"]
    with pytest.raises(CompressionError, match="expected a module after fully_shard, got a Sequential"):
        fsdp.register(mlp(), Compression.none, replicate)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match=r"fully_shard\(model, mesh=mesh\['shard'\]\)"):
        fsdp.register(sharded(mesh), Compression.none, replicate)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="Give the other dimension"):
        fsdp.register(sharded(mesh["shard"]), Compression.none, mesh["shard"])  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="of one dimension"):
        fsdp.register(sharded(mesh["shard"]), Compression.none, mesh)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match=r"works with torch\.optim\.SGD"):
        model = sharded(mesh["shard"])
        fsdp.register(model, Compression.detached(8), replicate).attach(torch.optim.Adam(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match=r"must see the optimizer's param groups|needs the learning rate"):
        model = sharded(mesh["shard"])
        fsdp.register(model, Compression.detached(8), replicate)  # type: ignore[arg-type]
        loss_of(model, 0).backward()
    with pytest.raises(CompressionError, match="clip_grad_norm_"):
        fsdp.register(sharded(mesh["shard"]), Compression.top_k(10, clip_norm=1.0), replicate)  # type: ignore[arg-type]
    model, optimizer, hook = made(mesh, Compression.none)
    with pytest.raises(CompressionError, match="Register once"):
        fsdp.register(model, Compression.none, replicate)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="holds none of the model's parameters"):
        hook.attach(sgd(mlp().parameters()))
    train(model, optimizer, range(1))
    with pytest.raises(CompressionError, match="are in different param groups"):
        hook.attach(torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1))


def main(file: str) -> None:
    rank, size = meet(file)
    warnings.filterwarnings("ignore", "a gradient or a payload held an inf")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for check in (
        without_compression_it_is_torchs_own,
        methods_are_their_simulation,
        replicas_agree,
        checkpoints,
        other_numbers_of_replicas,
        methods_that_apply_the_update,
        accumulation_and_infs,
        wrong_use_is_told,
    ):
        check(mesh)
        if rank == 0:
            print(f"passed {check.__name__}", flush=True)
    print(f"rank {rank} of {size}: all right", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
