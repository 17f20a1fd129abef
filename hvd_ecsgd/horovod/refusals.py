"""Exchanges that must not begin on an unmodified Horovod, as of what came before them."""

from __future__ import annotations

from typing import NoReturn

from ..errors import CompressionError, SequenceError

__all__ = ["raise_averaged_already", "raise_interrupted", "raise_never_applied", "raise_second_exchange"]


def raise_interrupted(name: str) -> NoReturn:
    """An exchange was ended by an error at parameter `name`, and another one comes."""
    raise SequenceError(
        f"an exchange before this one was ended by an error at parameter '{name}', which the script caught. Horovod takes it "
        "for started still, and cannot go on. Let such errors end the program; or make the compression and hvd.DistributedOptimizer anew, "
        "and drop the former ones."
    )


def raise_never_applied(name: str) -> NoReturn:
    """A step begins, and the update of the one before was not applied."""
    raise SequenceError(
        f"the update that was exchanged for parameter '{name}' was never applied, and nothing is exchanged a second time: call "
        "optimizer.step() (inside `with optimizer.skip_synchronize():` after synchronize()) before the next backward pass, or throw the step "
        "away by compression.discard(), on every rank."
    )


def raise_second_exchange(name: str, computed: bool) -> NoReturn:
    """A step begins, and the means of the one before were not applied. `computed`: by a backward pass."""
    raise SequenceError(
        f"the gradient of parameter '{name}' was averaged already, and {'a backward pass' if computed else 'another exchange'} began "
        "before step(): what the method keeps of it would come back in later steps. After optimizer.synchronize(), call optimizer.step() "
        "inside `with optimizer.skip_synchronize():`, or throw the step away by compression.discard(), on every rank."
    )


def raise_averaged_already(name: str) -> NoReturn:
    """A mean is about to be averaged again."""
    raise CompressionError(
        f"the gradient of parameter '{name}' was averaged already, and no backward pass has run since. After optimizer.synchronize(), "
        "call optimizer.step() inside `with optimizer.skip_synchronize():`. (Writing gradients by hand? Call zero_grad() first.)"
    )
