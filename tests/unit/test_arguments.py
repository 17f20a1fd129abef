"""Wrong arguments and wrong uses: each is an error that names the cause and the remedy."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError, DistributedOptimizer, exponential_ratios
from hvd_ecsgd.compressors import Cast, RandomBlock, Sign, TopK
from hvd_ecsgd.exchange import AllGather, AllReduce
from hvd_ecsgd.feedback import Hutchinson, LocalMomentum, Matrix, Product
from tests.cases import ALL, CASES, Case, ids
from tests.problems import batch, mlp

NAN, INF = float("nan"), float("inf")


SETTINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "ratio below 1": (lambda: Compression.random_block(0.5), "ratio"),
    "ratio a fraction, as in 1 %": (lambda: Compression.top_k(0.01), "ratio=100"),
    "ratio 0": (lambda: Compression.random_block(0), "ratio"),
    "ratio negative": (lambda: Compression.random_block(-4), "ratio"),
    "ratio nan": (lambda: Compression.top_k(NAN), "ratio"),
    "ratio inf": (lambda: Compression.random_block(INF), "ratio"),
    "ratio text": (lambda: Compression.random_block("64"), "ratio"),
    "ratio true": (lambda: Compression.random_block(True), "ratio"),
    "ratio tensor": (lambda: Compression.random_block(torch.tensor(4.0)), "ratio"),
    "ratio none": (lambda: Compression.random_block(None), "ratio"),
    "ratio and k": (lambda: Compression.top_k(4, k=4), "not both"),
    "detached ratio": (lambda: Compression.detached(0.9), "ratio"),
    "k 0": (lambda: Compression.top_k(k=0), "k must be"),
    "k negative": (lambda: Compression.top_k(k=-1), "k must be"),
    "k a fraction": (lambda: Compression.top_k(k=1.5), "k must be"),
    "k true": (lambda: Compression.top_k(k=True), "k must be"),
    "lambda below 0": (lambda: Compression.detached(lambda_=-0.1), "lambda_"),
    "lambda above 1": (lambda: Compression.detached(lambda_=1.1), "lambda_"),
    "lambda nan": (lambda: Compression.detached(lambda_=NAN), "lambda_"),
    "lambda text": (lambda: LocalMomentum("0.3"), "lambda_"),
    "scale": (lambda: Compression.one_bit("max"), "scale"),
    "seed text": (lambda: Compression.random_block(seed="0"), "seed"),
    "seed none": (lambda: Compression.random_block(seed=None), "seed"),
    "dense_below negative": (lambda: Compression.one_bit(dense_below=-1), "dense_below"),
    "dense_below a fraction": (lambda: Compression.one_bit(dense_below=0.5), "dense_below"),
    "start negative": (lambda: exponential_ratios(8, 3, start=-1), "start must be"),
    "start text": (lambda: exponential_ratios(8, 3, start="0"), "start must be"),
    "Matrix without a dictionary": (lambda: Matrix(torch.eye(3)), "dictionary from parameter name"),
    "Product without a function": (lambda: Product({"w": torch.eye(3)}), "Product: expected a function"),
    "Hutchinson without a function": (lambda: Hutchinson(0.9), "Hutchinson: expected a function"),
    "local for a rank": (lambda: Product(dict, 1), "local must be"),
    "central for a rank": (lambda: Compression.double_squeeze(central=0), "central must be"),
    "error_feedback none": (lambda: Compression.power_sgd(error_feedback=None), "error_feedback must be"),
    "a server that is no compressor": (lambda: Compression.comp_skip(server_compressor=5), "server_compressor: expected an instance"),  # type: ignore[arg-type]
    "a server that is a class": (lambda: Compression.comp_skip(server_compressor=TopK), "server_compressor: expected an instance"),  # type: ignore[arg-type]
    "saturation by a number": (lambda: Cast(saturate=1), "saturate must be True or False"),  # type: ignore[arg-type]
    "bind to a name": (lambda: Compression.top_k().bind(mlp(), "workers"), "process_set must be a ProcessSet"),
    "a point before the first step": (lambda: Compression.top_k().bind(mlp()).at("average"), "'averaged', 'virtual' or 'local'"),
    "attach a schedule": (lambda: Compression.top_k().bind(mlp()).attach(None), "expected the optimizer"),
    "attach a scale": (lambda: Compression.top_k().bind(mlp()).attach(torch.optim.SGD(mlp().parameters(), 0.1), 1024.0), "scaler must be"),
    "a class for a compressor": (lambda: Compression(TopK), "compressor"),
    "text for a compressor": (lambda: Compression("top_k"), "compressor"),
    "text for feedback": (lambda: Compression(Sign(), feedback="none"), "feedback"),
    "a class for an exchange": (lambda: Compression(Sign(), exchange=AllGather), "exchange"),
    "signs in an all-reduce": (lambda: Compression(Sign(), exchange=AllReduce()), "all-reduce"),
    "top-k in an all-reduce": (lambda: Compression(TopK(), exchange=AllReduce()), "all-reduce"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_wrong_settings(what: str) -> None:
    make, message = SETTINGS[what]
    with pytest.raises(CompressionError, match=message):
        make()


def test_settings_at_their_bounds_are_right() -> None:
    """Control: the nearest values that are allowed."""
    for make in (
        lambda: Compression.random_block(1),
        lambda: Compression.top_k(1.0),
        lambda: Compression.top_k(None, k=1),
        lambda: Compression.detached(1, 0),
        lambda: Compression.detached(lambda_=1),
        lambda: Compression.one_bit(dense_below=0, seed=-1),
        lambda: Compression(Sign()),
        lambda: Compression(RandomBlock(), exchange=AllReduce()),
    ):
        make().bind(mlp())


def test_every_preset_has_a_case() -> None:
    presets = {n for n, v in vars(Compression).items() if isinstance(v, staticmethod)} | {"none", "fp16", "bf16"}
    assert presets - {"auto"} == {c.name.split("-")[0] for c in CASES}, "auto chooses among others"
    assert len({c.name for c in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_presets_say_what_they_are(case: Case) -> None:
    """repr of a bound and an unbound method names compressor, feedback and exchange, and two of one preset are equal."""
    made = case.make()
    method = made.bind(mlp()).method
    assert method == case.make().bind(mlp()).method
    for part in (method.compressor, method.feedback, method.exchange):
        assert repr(part) in repr(made.bind(mlp()))


# -- bind ------------------------------------------------------------------------------------------------------------------------


def parameter(*shape: int, **options: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(*shape, **options))


def tied() -> Any:
    p = parameter(3)
    return [("a", p), ("b", p)]


BINDINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "duplicate names": (lambda: [("a", parameter(3)), ("a", parameter(4))], "'a'"),
    "one parameter under two names": (tied, "tied"),
    "complex": (lambda: [("spectrum", parameter(3, dtype=torch.complex64))], "spectrum.*complex"),
    "tensors without names": (lambda: mlp().parameters(), "named_parameters"),
    "names without tensors": (lambda: ["a", "b"], "named_parameters"),
    "name no text": (lambda: [(0, parameter(3))], "named_parameters"),
    "nothing": (lambda: [], "no parameter"),
    "all frozen": (lambda: mlp().requires_grad_(False), "no parameter"),
    "not a leaf": (lambda: [("doubled", parameter(3) * 2)], "doubled"),
    "without a shape": (lambda: torch.nn.LazyLinear(3), "'weight' of a lazy module"),
    "without values": (lambda: torch.nn.Linear(3, 3, device="meta"), "'weight' is on the meta device"),
}


@pytest.mark.parametrize("what", BINDINGS)
def test_wrong_bindings(what: str) -> None:
    make, message = BINDINGS[what]
    with pytest.raises(CompressionError, match=message):
        Compression.top_k().bind(make())


def test_integer_parameters_are_not_trained() -> None:
    """They cannot have gradients: bound as frozen, and nothing is kept for them."""
    table = torch.nn.Parameter(torch.arange(4), requires_grad=False)
    bound = Compression.top_k().bind([("table", table), ("w", parameter(3))])
    assert [n for n, _ in bound.named] == ["w"]


# -- DistributedOptimizer --------------------------------------------------------------------------------------------------------


def wrap(optimizer: Any = None, compression: Any = Compression.none, model: Any = None, **options: Any) -> Any:
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer(model.parameters())
    return DistributedOptimizer(optimizer, options.pop("named_parameters", model.named_parameters()), compression, **options)


UPDATE: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], str]] = {
    "Adam": (lambda p: torch.optim.Adam(p), "SGD"),
    "Nesterov": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "nesterov"),
    "dampening": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1), "dampening"),
    "maximize": (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
}


@pytest.mark.parametrize("what", UPDATE)
def test_update_unit_methods_need_plain_sgd(what: str) -> None:
    """They apply momentum and the update themselves: anything SGD would do beyond that is refused, and works in gradient units (control)."""
    optimizer, message = UPDATE[what]
    with pytest.raises(CompressionError, match=message):
        wrap(optimizer, Compression.detached())
    wrap(optimizer, Compression.random_block())


def test_update_unit_methods_refuse_options_that_are_changed_later() -> None:
    model = mlp()
    optimizer = wrap(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), Compression.local_momentum(), model)
    model(torch.ones(2, 20)).sum().backward()
    optimizer.param_groups[0]["nesterov"] = True
    with pytest.raises(CompressionError, match="nesterov"):
        optimizer.step()


def test_update_unit_methods_refuse_sums() -> None:
    with pytest.raises(CompressionError, match="sum"):
        wrap(compression=Compression.detached(), sum_gradients=True)


def plain_step(model: torch.nn.Module) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 20)).sum().backward()
    return optimizer


def test_an_update_unit_method_never_vanishes() -> None:
    """Stepped by a plain optimizer (as Horovod's with one process), it raises instead of doing nothing; attach() refuses it too."""
    model = mlp()
    bound = Compression.detached().bind(model)
    optimizer = plain_step(model)
    with pytest.raises(CompressionError, match="DistributedOptimizer"):
        optimizer.step()
    with pytest.raises(CompressionError, match="DistributedOptimizer"):
        bound.attach(optimizer)
    plain_step(mlp()).step()  # of another model: none of its business


def test_a_gradient_unit_method_leaves_plain_optimizers_alone() -> None:
    model = mlp()
    bound = Compression.top_k().bind(model)
    plain_step(model).step()
    assert bound.undone_steps == 0


def test_forgotten_bindings_disturb_nobody() -> None:
    """Binding and dropping update-unit methods leaves optimizers of other models, and of the same one, as they were."""
    model = mlp()
    forgotten = [Compression.detached().bind(model), Compression.local_momentum().bind(mlp())]
    alive = Compression.detached().bind(mlp())
    forgotten.clear()
    gc.collect()
    plain_step(model).step()
    plain_step(mlp()).step()
    assert alive.undone_steps == 0


WRAPPINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "compression as text": (lambda: wrap(compression="top_k"), "compression"),
    "compression as a class": (lambda: wrap(compression=Compression), "compression"),
    "a compressor for a compression": (lambda: wrap(compression=TopK()), "compression"),
    "passes 0": (lambda: wrap(backward_passes_per_step=0), "backward_passes_per_step"),
    "passes 1.0": (lambda: wrap(backward_passes_per_step=1.0), "backward_passes_per_step"),
    "names of some only": (lambda: wrap(named_parameters=list(mlp().named_parameters())[:2]), "no name"),
    "another model bound": (lambda: wrap(compression=Compression.top_k().bind(mlp())), "bound"),
    "twice": (lambda: DistributedOptimizer(wrap()), "already"),
    "a model for its parameters' names": (lambda: wrap(named_parameters=torch.nn.Linear(2, 2)), "such as model.named_parameters.., got Linear"),
    "no optimizer": (lambda: DistributedOptimizer(None), "expected a torch.optim optimizer, got None"),
    "parameters for an optimizer": (lambda: DistributedOptimizer(mlp().parameters()), "expected a torch.optim optimizer"),
}


@pytest.mark.parametrize("what", WRAPPINGS)
def test_wrong_wrapping(what: str) -> None:
    make, message = WRAPPINGS[what]
    with pytest.raises(CompressionError, match=message):
        make()


def test_a_bound_object_serves_one_optimizer() -> None:
    model = mlp()
    bound = Compression.top_k().bind(model)
    wrap(compression=bound, model=model)
    with pytest.raises(CompressionError, match="another optimizer"):
        wrap(compression=bound, model=model)
    with pytest.raises(CompressionError, match="another optimizer"):
        bound.compress(torch.ones(3))


def test_attach_names_the_wrong_optimizer() -> None:
    model = mlp()
    bound = Compression.top_k().bind(model)
    with pytest.raises(CompressionError, match="none of the bound"):
        bound.attach(torch.optim.SGD(mlp().parameters(), lr=0.1))
    right = torch.optim.SGD(model.parameters(), lr=0.1)
    assert bound.attach(right) is bound
    assert bound.attach(right) is bound
    own = wrap(model=mlp())
    assert own.compression.attach(own) is own.compression


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("none", "fp16", "bf16")], ids=ids)
def test_unbound_methods_with_state_cannot_compress(case: Case) -> None:
    with pytest.raises(CompressionError, match="bind"):
        case.make().compress(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_bare_presets_are_horovods(dtype: torch.dtype) -> None:
    """`none` and `fp16`, bare and called, as Horovod's own: integers are left alone, types come back."""
    t = torch.tensor([1, 2, 3]).to(dtype)
    for made in (Compression.none, Compression.none(), Compression.fp16, Compression.fp16()):
        sent, context = made.compress(t)
        half = "fp16" in repr(made) or made is Compression.fp16 or "Cast" in repr(made)
        assert sent.dtype == (torch.float16 if half and dtype.is_floating_point else dtype)
        back = made.decompress(sent, context)
        assert back.dtype == dtype
        assert torch.equal(back, t)


# -- changed parameters ----------------------------------------------------------------------------------------------------------


def test_a_changed_shape_is_named() -> None:
    p = parameter(8)
    optimizer = wrap(model=torch.nn.ParameterList([p]), compression=Compression.top_k(2, **ALL))
    p.sum().backward()
    optimizer.step()
    p.grad = None
    p.data = torch.ones(9)
    with pytest.raises(CompressionError, match=r"'0' has shape \(9,\).*\(8,\)"):
        p.sum().backward()


def test_unfreezing_and_adding_parameters_is_refused() -> None:
    """Parameters that start to train later would come apart between ranks without a word."""
    model = mlp()
    model[0].bias.requires_grad_(False)
    optimizer = wrap(model=model)
    with pytest.raises(CompressionError, match="add_param_group"):
        optimizer.add_param_group({"params": [parameter(3)]})
    model[0].bias.requires_grad_(True)
    model(torch.ones(2, 20)).sum().backward()
    with pytest.raises(CompressionError, match="frozen"):
        optimizer.step()


def test_lbfgs_is_refused() -> None:
    model = mlp()
    with pytest.raises(CompressionError, match="LBFGS evaluates its closure several times"):
        DistributedOptimizer(torch.optim.LBFGS(model.parameters()), model.named_parameters())


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("given", [lambda m: dict(m.named_parameters()), lambda m: list(m.parameters()), lambda m: "weights"])
def test_named_parameters_that_are_no_pairs_are_refused(given: Callable[[torch.nn.Module], Any], bound: bool) -> None:
    model = mlp()
    compression = Compression.top_k(4)
    with pytest.raises(CompressionError, match=r"named_parameters: expected \(name, parameter\) pairs"):
        DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), given(model), compression.bind(model) if bound else compression)


@pytest.mark.parametrize("name", ["attach", "state_dict", "at"])
def test_what_needs_a_bound_compression_says_so(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"'{name}' is for a bound compression: .*bind\(model\)"):
        getattr(Compression.random_block(4), name)
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        Compression.random_block(4).atach  # noqa: B018


class Unhookable(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def register_state_dict_pre_hook(self, hook: Any) -> Any:
        raise RuntimeError("register_state_dict_pre_hook is not supported here")


@pytest.mark.parametrize(
    "wrap_model",
    [torch.jit.script, lambda model: torch.compile(model, backend="eager"), torch.nn.DataParallel, lambda model: Unhookable()],
    ids=["scripted", "compiled", "DataParallel", "hooks refused"],
)
def test_wrapped_modules_bind_and_train(wrap_model: Callable[[Any], Any]) -> None:
    """They train as the plain module does. A scripted one has no warning about saving, and nothing else is missing."""

    def trained(model: Any) -> torch.Tensor:
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compression=Compression.detached(4, **ALL).bind(model))
        for t in range(3):
            optimizer.zero_grad()
            x, y = batch(0, t)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        with optimizer.compression.at("averaged"):
            return torch.cat([v.reshape(-1) for v in model.state_dict().values()])

    one, other = trained(wrap_model(mlp())), trained(mlp())
    assert one.shape == other.shape and (one - other).abs().max() < 0.2


def test_frozen_parameters_may_be_complex_or_without_values() -> None:
    model = mlp()
    model.register_parameter("phases", torch.nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False))
    model.register_parameter("absent", torch.nn.Parameter(torch.empty(3, device="meta"), requires_grad=False))
    bound = Compression.top_k(4).bind(model)
    assert {name for name, _ in bound.named} == {name for name, _ in mlp().named_parameters()}
    for name in ("phases", "absent"):
        trainable = mlp()
        parameter = getattr(model, name)
        trainable.register_parameter(name, torch.nn.Parameter(parameter.detach()))
        with pytest.raises(CompressionError, match=name):
            Compression.top_k(4).bind(trainable)
