"""What real scripts do to an unmodified Horovod between steps; one program on two ranks."""

from __future__ import annotations

from tests.ranks import horovodrun, require_horovod

PROGRAM = """
import warnings
import torch, horovod.torch as hvd
from hvd_ecsgd import Compression

hvd.init()
rank = hvd.rank()
warnings.simplefilter("ignore")

def make(compression, momentum=0.9, lr=0.05, prefix="", **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
    named = [(prefix + n, p) for n, p in model.named_parameters()]
    bound = compression.bind(model)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum), named, compression=bound, **options)
    bound.attach(optimizer)
    return model, optimizer, bound

data = torch.randn(12, 8, 20, generator=torch.Generator().manual_seed(1 + rank))
everything = {"dense_below": 0, "dense_1d": False}

def step(model, optimizer, t, spoil=False):
    optimizer.zero_grad()
    loss = model(data[t]).square().mean()
    if spoil:
        loss = loss + model[0].weight[0, 0] * float("nan")
    loss.backward()
    optimizer.step()

def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

def equal(t, name):
    everybody = hvd.allgather(t[None], name=name)
    return all(torch.equal(e, everybody[0]) for e in everybody)

# An undone step changes nothing on any rank, momentum included; the steps around it do (control).
for i, compression in enumerate((Compression.random_block(4, **everything), Compression.double_squeeze(**everything))):
    model, optimizer, bound = make(compression)
    for t in range(2):
        step(model, optimizer, t)
    before = flat(model)
    step(model, optimizer, 2, spoil=rank == 1)
    assert torch.equal(flat(model), before) and bound.undone_steps == 1
    step(model, optimizer, 3)
    assert not torch.equal(flat(model), before) and flat(model).isfinite().all()
    assert equal(flat(model), f"undone{i}")

# A parameter frozen in mid-training stands still.
model, optimizer, bound = make(Compression.random_block(4, **everything), momentum=0.0)
for t in range(3):
    step(model, optimizer, t)
model[0].weight.requires_grad_(False)
before = model[0].weight.detach().clone()
for t in range(3, 6):
    step(model, optimizer, t)
assert torch.equal(model[0].weight, before)

# One value beyond half precision is sent in parts, and does not stop training.
x = torch.nn.Parameter(torch.zeros(1))
bound = Compression.fp16(error_feedback=True, **everything).bind([("x", x)])
optimizer = hvd.DistributedOptimizer(torch.optim.SGD([x], lr=1.0), [("x", x)], compression=bound)
for gradient in (1e5, *[0.0] * 6):
    optimizer.zero_grad()
    (x * gradient).sum().backward()
    optimizer.step()
assert bound.undone_steps == 0 and abs(x.item() + 1e5) < 1, x.item()

# Between the two backward passes of a step nothing is saved or loaded; after the step it is (control).
model, optimizer, bound = make(Compression.top_k(4, **everything), prefix="passes.", backward_passes_per_step=2)
for t in range(2):
    optimizer.zero_grad()
    for half in range(2):
        model(data[2 * t + half]).square().mean().backward()
        if t:
            try:
                bound.state_dict()
                raise AssertionError("half a step was saved")
            except ValueError as error:
                assert "between a backward pass and its optimizer.step" in str(error), error
    optimizer.step()
    bound.load_state_dict(bound.state_dict())

# Two models with the same inner names, one backward pass through both.
a, optimizer_a, _ = make(Compression.top_k(4, **everything), prefix="a.")
b, optimizer_b, _ = make(Compression.top_k(4, **everything), prefix="b.")
for t in range(3):
    for optimizer in (optimizer_a, optimizer_b):
        optimizer.zero_grad()
    first, second = (a, b) if rank == 0 else (b, a)
    (first(data[t]).square().mean() + second(data[t]).abs().mean()).backward()
    optimizer_a.step()
    optimizer_b.step()
assert equal(flat(a), "a") and equal(flat(b), "b")

# Gradients accumulated over two passes, zeroed in place in between: no false alarm about averaging twice.
model, optimizer, bound = make(Compression.random_block(4, **everything), backward_passes_per_step=2)
for epoch in range(2):
    for t in range(2):
        model(data[t]).square().mean().backward()
    optimizer.step()
    for p in model.parameters():
        p.grad.zero_()
    model(data[2]).square().mean().backward()
    optimizer.step()
    for p in model.parameters():
        p.grad.zero_()
print("survived", rank)
"""


def test_what_happens_between_steps() -> None:
    require_horovod()
    printed = horovodrun(2, PROGRAM)
    assert "survived 0" in printed and "survived 1" in printed, printed
