"""Steps that must not be taken, or were not what they seemed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NoReturn

import torch

from ..errors import CompressionError, SequenceError
from .hooks import GradientHooks
from .step import StepExchange

__all__ = ["check_all_bound", "check_in_use", "raise_if_lost", "raise_on_the_way", "raise_unapplied"]


def check_in_use(hooks: GradientHooks) -> None:
    """Raise `CompressionError` when a newer optimizer has taken over the parameters."""
    if not hooks.listens:
        raise CompressionError(
            "step() of an optimizer that is not in use any more: a newer DistributedOptimizer was made for its parameters "
            f"('{hooks.taken_over}', …), and exchanges their gradients. Step that one, and drop this one."
        )


def check_all_bound(optimizer: torch.optim.Optimizer, bound: Collection[int]) -> None:
    """Raise `CompressionError` when the optimizer trains a parameter that is not exchanged; `bound`: the ids of those that are."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad and id(p) not in bound:
                raise CompressionError(
                    f"a parameter of shape {tuple(p.shape)} takes part in training but was frozen or absent when this optimizer was "
                    "made, so ranks would drift apart; "
                    "make a new DistributedOptimizer after unfreezing or adding parameters, or wrap while all is trainable and freeze then."
                )


def raise_if_lost(step: StepExchange, parameters: Sequence[torch.nn.Parameter], lost: bool, local: bool) -> None:
    """After a step that was undone: raise `CompressionError`, on all ranks, where the reason was an exception in a backward pass, not an inf or NaN.

    `lost`: so it was on this rank. Collective, but after a `local` step.
    """
    said, transport = torch.tensor([lost], dtype=torch.uint8, device="cpu"), step.transport
    everyones = [said] if local else transport.allgather(said, "undone", [1] * transport.size).wait()
    ranks = [r for r, t in enumerate(everyones) if bool(t)]
    if not ranks:
        return
    step.forget()
    for p in parameters:
        p.grad = None
    where = "this rank" if local else f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    raise CompressionError(
        f"a backward pass on {where} was ended by an exception, which the script caught, and only some of its gradients were there. So the step was "
        f"undone{'' if local else ' on all ranks'}, and nothing was applied. Let the exception end the program; or catch this one too, on all ranks, "
        "and go on with the next batch."
    )


def raise_on_the_way() -> NoReturn:
    """Gradients are on their way, and `zero_grad` was called."""
    raise SequenceError(
        "zero_grad() was called after a backward pass and before step() or synchronize(): gradients on their way would be lost. "
        "Call it after step(). Gradients that another loss has left here (of a GAN's generator, say) are best not made: freeze this model "
        "(requires_grad_(False)) during that backward pass. Those that are to be thrown away, accumulated ones too: optimizer.discard(), on "
        "every rank."
    )


def raise_unapplied(what: str) -> NoReturn:
    """Gradients were exchanged and are not applied, and `what` comes."""
    raise SequenceError(
        f"{what} after synchronize() and before step(): what was exchanged is not applied yet, and what the method keeps of it would come "
        "back in later steps. Call optimizer.step() inside `with optimizer.skip_synchronize():`, or throw the step away by "
        "optimizer.discard(), on every rank."
    )
