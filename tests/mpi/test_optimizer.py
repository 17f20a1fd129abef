"""What a user's script does around mpi_backend's optimizer, on real ranks."""

from __future__ import annotations

from tests.ranks import mpirun

BROADCAST = """
import torch, mpi_backend as hvd
hvd.init()
torch.manual_seed(hvd.rank())
model = torch.nn.Linear(64, 64)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
compression = hvd.Compression.detached(8).bind(model)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), model.named_parameters(), compression)
data = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(hvd.rank()))

def steps(n):
    for i in range(n):
        optimizer.zero_grad()
        model(data[i]).square().mean().backward()
        optimizer.step()

def everyones(what):
    with compression.at(what):
        return hvd.allgather(model.weight.detach()[None])

steps(3)
shifted = everyones("local")
assert not torch.equal(shifted[0], shifted[1]), "the control: workers are at different points"
with compression.at("averaged"):
    if hvd.rank() == 0:
        model.weight.data.fill_(5.0)  # behind torch's back: only the broadcast can tell
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
steps(1)
x = everyones("averaged")
assert torch.equal(x[0], x[1])
assert (x[0] - 5).abs().max() < 1, "the step went on from what was broadcast"
steps(2)
x = everyones("averaged")
assert torch.equal(x[0], x[1])
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
try:
    steps(1)
except ValueError as error:
    assert "averaged" in str(error)
    print("ok", hvd.rank())
"""


def test_a_broadcast_in_the_middle_of_training_is_taken_over_by_def() -> None:
    assert "ok 0" in mpirun(2, BROADCAST)


TWO_MODELS = """
import torch, mpi_backend as hvd
hvd.init()

def make():
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40)
    return model, hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), hvd.Compression.top_k(4))

(a, optimizer_a), (b, optimizer_b) = make(), make()
x = torch.randn(8, 40, generator=torch.Generator().manual_seed(hvd.rank()))
for t in range(4):
    optimizer_a.zero_grad()
    optimizer_b.zero_grad()
    first, second = (a, b) if hvd.rank() == 0 else (b, a)
    loss = first(x).square().mean()
    if t != 2 or hvd.rank() == 0:  # and once one rank does not use one of the models
        loss = loss + second(x).abs().mean()
    loss.backward()
    optimizer_a.step()
    optimizer_b.step()
for model in (a, b):
    weights = hvd.allgather(model.weight.detach()[None])
    assert torch.equal(weights[0], weights[1])
assert not torch.equal(a.weight, b.weight)
print("ok", hvd.rank())
"""


def test_two_models_in_one_backward_pass_in_different_orders() -> None:
    assert "ok 1" in mpirun(2, TWO_MODELS)
