"""What the collectives are given, checked: tensors, operations, factors, roots, compressors; and what is worked on in their place."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from hvd_ecsgd import BoundCompression
from hvd_ecsgd.arguments import as_integer
from hvd_ecsgd.exchange import HorovodCompressor, is_horovod_compressor

from .. import runtime
from ..process_sets import ProcessSet

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = torch.Tensor | np.ndarray[Any, Any]

__all__ = [
    "Adasum", "Average", "Max", "Min", "OP_NAMES", "Product", "REDUCTIONS", "Reduction", "Sum",
    "check_op", "check_root", "check_tensor", "check_tensors", "compress_all", "describe", "fresh_copy", "is_differentiated", "only",
    "work_of", "write",
]  # fmt: skip

Average = 0
Sum = 1
Adasum = 2
"""There for scripts that name it; using it raises NotImplementedError."""
Min = 3
Max = 4
Product = 5
OP_NAMES = {Average: "Average", Sum: "Sum", Min: "Min", Max: "Max", Product: "Product"}
REDUCTIONS: Any = {Average: "sum", Sum: "sum", Min: "min", Max: "max", Product: "product"}
_REDUCIBLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def describe(t: torch.Tensor, rows: bool = False) -> str:
    """Type and shape (`rows`: without the first dimension), as ranks compare them."""
    shape = ", ".join(["rows", *map(str, t.shape[1:])] if rows else map(str, t.shape))
    return f"{str(t.dtype).removeprefix('torch.')} ({shape})" + (f" on {t.device.type}" if t.device.type != "cpu" else "")


def check_root(root_rank: int, process_set: ProcessSet, what: str) -> int:
    """The rank of `root_rank` within the process set."""
    ranks = runtime.members(process_set).ranks
    root = as_integer(root_rank)
    if root is None or root not in ranks:
        expected = f"0 to {len(ranks) - 1}" if ranks == tuple(range(len(ranks))) else f"one of {', '.join(map(str, ranks))}"
        raise ValueError(f"{what}: root_rank is {root_rank!r}; there are {len(ranks)} ranks, expected {expected}.")
    return ranks.index(root)


def check_op(op: int | None, average: bool | None) -> int:
    """The operation meant by `op` and its deprecated form. Raises ValueError for what is none, NotImplementedError for Adasum."""
    if average is not None:
        if op is not None:
            raise ValueError("allreduce: op supersedes average; give op only.")
        if hasattr(average, "__array__"):
            raise ValueError("allreduce: average is a tensor, expected True or False; several tensors go to grouped_allreduce([…]).")
        warnings.warn("allreduce: average is deprecated; use op=Average or op=Sum.", DeprecationWarning, stacklevel=4)
        return Average if average else Sum
    if op is None:
        return Average
    if not isinstance(op, numbers.Integral) or op not in {*OP_NAMES, Adasum}:
        raise ValueError(f"allreduce: op is {op!r:.100}; expected one of {', '.join(OP_NAMES.values())}.")
    if op == Adasum:
        raise NotImplementedError("Adasum is not implemented; use op=Average, or Horovod itself.")
    return op


@dataclass(frozen=True)
class Reduction:
    """What a reduction does to numbers: the operation, as `check_op` returns it, and the factors before and after. Ranks compare its text."""

    op: int
    prescale: float = 1.0
    postscale: float = 1.0

    def __str__(self) -> str:
        factors = (self.prescale, self.postscale)
        return OP_NAMES[self.op] + (f", scaled by {self.prescale!r} and {self.postscale!r}" if factors != (1.0, 1.0) else "")

    def of(self, tensors: Iterable[torch.Tensor], what: str) -> Reduction:
        """The same with factors that are floats. Raises ValueError for types that have no sum, and for factors that are no numbers."""
        for t in tensors:
            if t.dtype not in _REDUCIBLE:
                known = ", ".join(str(d).removeprefix("torch.") for d in _REDUCIBLE)
                raise ValueError(f"{what}: Tensor type {t.dtype} is not supported. Expected one of {known}; convert it first.")
        if not all(isinstance(f, numbers.Real) for f in (self.prescale, self.postscale)):
            raise ValueError(f"{what}: prescale_factor and postscale_factor must be numbers, got {self.prescale!r} and {self.postscale!r}.")
        return replace(self, prescale=float(self.prescale), postscale=float(self.postscale))

    def check_gradient(self, what: str) -> None:
        """Raise ValueError for operations that cannot be differentiated."""
        if self.op not in (Average, Sum):
            raise ValueError(f"{what}: {OP_NAMES[self.op]} has no gradient here; use Average or Sum, or detach the tensor.")


def check_tensor(array: Array, what: str, written: bool = False) -> torch.Tensor:
    """The array as a tensor over the same memory. Raises ValueError for what cannot travel, and, if it is to be `written`, for what cannot be."""
    if isinstance(array, torch.Tensor):
        if array.is_nested:
            raise ValueError(f"{what}: a nested tensor is not supported; pass its parts, or one of torch.nested.to_padded_tensor.")
        if array.layout != torch.strided:
            raise ValueError(f"{what}: a tensor of layout {array.layout} is not supported; pass tensor.to_dense().")
        if array.is_meta:
            raise ValueError(f"{what}: a tensor of shape {tuple(array.shape)} on the meta device has no values to send; give it some first.")
        if array.is_quantized:
            raise ValueError(f"{what}: a quantised tensor ({array.dtype}) is not supported, as its scale would not travel; pass tensor.dequantize().")
        if written and any(stride == 0 and n > 1 for stride, n in zip(array.stride(), array.shape, strict=True)):
            raise ValueError(f"{what}: elements of the tensor of shape {tuple(array.shape)} share memory, and would be written; pass tensor.clone().")
        return array
    if hasattr(array, "__array__"):
        if written and not getattr(getattr(array, "flags", None), "writeable", True):  # MPI would write there all the same, or crash in a mapped file
            raise ValueError(f"{what}: the NumPy array is read-only, and the result would be written there; pass array.copy().")
        try:
            return torch.as_tensor(array, device="cpu")  # shares memory
        except TypeError as error:
            raise ValueError(f"{what}: a NumPy array of type {array.dtype} is no tensor ({error}); use the object functions.") from None
    raise ValueError(f"{what}: expected a tensor or a NumPy array, not {type(array).__name__}; pass torch.as_tensor(…), or use the object functions.")


def check_tensors(arrays: Iterable[Array], what: str, written: bool = False) -> list[torch.Tensor]:
    """`check_tensor` of each. Raises ValueError for one tensor in place of a list."""
    if isinstance(arrays, torch.Tensor | str | Mapping) or hasattr(arrays, "__array__") or not isinstance(arrays, Iterable):
        raise ValueError(f"{what}: expected a list of tensors, got one {type(arrays).__name__}; pass [tensor].")
    return [check_tensor(array, what, written) for array in arrays]


def compress_all(tensors: Sequence[torch.Tensor], compression: HorovodCompressor, what: str) -> tuple[list[torch.Tensor], list[Any]]:
    """What `compression` makes of each, and what it wants back to decompress. Raises ValueError for what is no such compression."""
    if isinstance(compression, BoundCompression):
        raise ValueError(f"{what}: {compression!r} belongs to the gradients of a DistributedOptimizer; pass Compression.none or .fp16 here.")
    if not is_horovod_compressor(compression):
        raise ValueError(f"{what}: compression is {compression!r:.100}; expected Compression.none or .fp16, or what has compress and decompress.")
    pairs = [compression.compress(t) for t in tensors]
    return [t for t, _ in pairs], [extra for _, extra in pairs]


def is_differentiated(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether autograd is to know of the collective."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def work_of(t: torch.Tensor) -> torch.Tensor:
    """What the communication thread works on: `t` itself if it may, else a copy. A view that is lazily conjugated or negated has other values
    than its memory."""
    return fresh_copy(t) if t.is_inference() else t.detach().contiguous().resolve_conj().resolve_neg()


def fresh_copy(t: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that any thread may write to."""
    with torch.inference_mode(False):  # an inference tensor can only be written to in a thread that is in inference mode
        return t.detach().clone(memory_format=torch.contiguous_format)


def write(work: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out`, with the values of `work`, which may share its memory."""
    if work.data_ptr() != out.data_ptr():
        out.detach().copy_(work)
    elif not out.is_inference():
        # MPI wrote behind torch's back; autograd, and methods that keep a copy of the parameters, look at the version. On root too: all alike.
        torch.autograd.graph.increment_version(out)
    return out


def only(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensor of a group of one."""
    return tensors[0]
