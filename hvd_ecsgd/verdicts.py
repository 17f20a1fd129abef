"""What a GPU knows, and the host not before it waits: whether all was finite, and whether payloads were whole. It is read together, once a step."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch

__all__ = ["Verdict", "all_of", "doubt", "known", "known_at_the_end", "verdict"]

Verdict: TypeAlias = bool | torch.Tensor
"""True when all is well; where a device alone knows, a 0-dim bool tensor there, which takes a wait to look at."""

_doubts: deque[tuple[torch.Tensor, Callable[[], Exception]]] = deque()
"""That nobody has looked at: whether something is wrong, and what to raise then."""
_MOST = 4096


def verdict(good: torch.Tensor) -> Verdict:
    """What the one element of `good` says: at once on the CPU."""
    return bool(good) if good.device.type == "cpu" else good.view(())


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Whether all is well, of one device. Nobody waits for it."""
    result: Verdict = True
    for one in verdicts:
        result = one if result is True else result & one
    return result


def doubt(wrong: torch.Tensor, error: Callable[[], Exception]) -> None:
    """Raise what `error` gives where the one element of `wrong` is True: at once on the CPU, elsewhere when the next step of this process ends."""
    if wrong.device.type == "cpu":
        if bool(wrong):
            raise error()
        return
    _doubts.append((wrong.view(()), error))
    if len(_doubts) > _MOST:  # of somebody who decodes outside of steps
        known_at_the_end(())


def known(verdicts: Iterable[Verdict]) -> bool:
    """Whether all is well; the host waits, once for each device that knows of any."""
    return _read(list(verdicts), [])


def known_at_the_end(verdicts: Iterable[Verdict]) -> bool:
    """Likewise of a step, of which everything was started; raises what is doubted and is wrong."""
    doubts = []
    with contextlib.suppress(IndexError):  # other threads add, and take, too
        while True:
            doubts.append(_doubts.popleft())
    return _read(list(verdicts), doubts)


def _read(verdicts: list[Verdict], doubts: list[tuple[torch.Tensor, Callable[[], Exception]]]) -> bool:
    asked = [one for one in verdicts if isinstance(one, torch.Tensor)]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for t in [*asked, *(wrong for wrong, _ in doubts)]:
        by_device.setdefault(t.device, []).append(t)
    answers = {device: iter(torch.stack(some).tolist()) for device, some in by_device.items()}
    good = [next(answers[t.device]) for t in asked]
    for wrong, error in doubts:
        if next(answers[wrong.device]):
            raise error()
    return all(good) and all(one for one in verdicts if not isinstance(one, torch.Tensor))
