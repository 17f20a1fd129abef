"""A step that some rank cannot take, as its hyper-parameters would spoil for good what the method keeps."""

from __future__ import annotations

from typing import Protocol

import torch

from ..transport.base import Transport

__all__ = ["Refusal", "not_applied"]


def not_applied(wrong: str, discards: str) -> str:
    """What to say of hyper-parameters that became `wrong` when all had been exchanged. `discards`: the object whose `discard` undoes a step."""
    return (
        f"{wrong}, which was set after the gradients' exchange had begun. Nothing was applied on this rank: set the value right, and call "
        f"optimizer.step() inside `with optimizer.skip_synchronize():`; or throw the step away by {discards}.discard(), on every rank."
    )


class _Others(Protocol):
    """What the ranks said when the step began."""

    def sends_nothing(self, group: int) -> bool: ...


class Refusal:
    """Of the step under way, if somebody refuses it. Such a step is begun, sent (as NaN) and undone like every other, so that no rank waits."""

    def __init__(self) -> None:
        self.wrong = ""
        """What this rank cannot take the step with."""
        self.heard = False
        """Some rank cannot, as all have heard."""
        self.others: _Others | None = None
        """On a rank that cannot: where to see what the others do."""
        self._text = ""

    def begin(self, wrong: str) -> None:
        """A step begins; `wrong`: what this rank cannot take it with, or nothing."""
        self.wrong, self.heard, self.others = wrong, False, None

    def hear(self) -> None:
        """Some rank cannot take this step, as all ranks hear."""
        self.heard = True

    def learning_rate_of_others(self, group: int) -> float:
        """0 if the others send nothing for this param group, as their learning rate is 0, else 1: who cannot take a step sends what they do."""
        return 0.0 if self.others is not None and self.others.sends_nothing(group) else 1.0

    def end(self, step: int, where: str, transport: Transport | None) -> None:
        """The step was undone: find out who cannot take it, and with what. Collective over `transport`, if there is one."""
        said = {"this rank": self.wrong}
        if transport is not None:
            text = torch.frombuffer(bytearray(self.wrong.encode() + b" "), dtype=torch.uint8)
            said = {f"rank {r}": bytes(t.tolist()).decode().strip() for r, t in enumerate(transport.allgather(text, "refused").wait())}
        wrong = {who: what for who, what in said.items() if what}
        everybody = len(wrong) == len(said)
        found = "; ".join(dict.fromkeys(wrong.values()) if everybody else (f"{who}: {what}" for who, what in wrong.items()))
        self._text = (
            f"{found}, which would spoil for good what the method keeps. Expected finite numbers, and lr ≥ 0. Step {step} was undone on "
            f"{where} and not applied; set the value right, and training goes on."
        )

    def take(self) -> str:
        """After the step: on every rank what to raise when it was refused for somebody's hyper-parameters, once; else nothing."""
        text, self._text = self._text, ""
        return text
