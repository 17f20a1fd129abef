"""How the ranks tell each other what they begin, on our own transports. An unmodified Horovod's is in `horovod.meeting`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..core.agreement import Agreement, Comparison
from ..core.talk import raise_if_joined
from ..errors import DisagreementError
from ..transport import Transport
from .executor import Executor, wait_patiently

__all__ = ["Meeting"]


class Meeting:
    """Of one bound method. `note`: what the other ranks are told when a step begins; it has one length on all of them.

    The same small collective begins all that ranks do together, so that they see when they do not do the same. What follows differs: who has joined
    learns from it whether the others begin a step, and `attend`s it then.
    """

    def __init__(self, agreement: Agreement, transport: Transport, executor: Executor, note: Callable[[], bytes]) -> None:
        self._agreement, self._transport, self._executor, self._note = agreement, transport, executor, note
        self._opening: Comparison | None = None
        self.called = ""
        """The function outside of a step in which this rank waits for the others to call it, too."""

    @property
    def begun(self) -> bool:
        """The other ranks were told what begins, and have not been found to agree so far."""
        return self._opening is not None

    def start_again(self) -> None:
        """There are fewer workers than before: nothing was said to them so far."""
        self._opening = None
        self._agreement.start_again()

    def open(self, note: bytes | None = None, joined: bool = False, outside: str = "") -> Comparison:
        """Tell the other ranks that this one begins a step, or what else. `joined`, `outside`: as in `Agreement.compare`."""
        self._opening = self._agreement.compare(self._transport, self._note() if note is None else note, joined, outside)
        if not joined and not outside:
            self.attend()
        return self._opening

    def attend(self, joined: bool = False) -> None:
        """The rest of the beginning of a step."""
        assert self._opening is not None
        self._agreement.begin_step_together(self._transport, joined, check_same=partial(self._check_same, self._opening))

    def before(self, what: str) -> None:
        """All ranks call this before they do `what` together outside of a step, or at the end of one. See `Driver.meet`."""
        opened: list[Comparison] = []

        def open_and_wait() -> None:
            opened.append(self.open(outside=what))
            wait_patiently(opened[0])
            self.agree()

        self.called = what
        try:
            self._executor.submit(open_and_wait)  # which tells the other ranks when this takes long
            self._executor.drain()
        finally:
            self.called = ""
        raise_if_joined(what, opened[0].doing())

    def agree(self) -> None:
        """Nothing that was received is used before ranks are known to agree."""
        opening, self._opening = self._opening, None
        if opening is not None:
            self._check_same(opening)
            self._agreement.finish_comparisons()
            opening.raise_if_different()

    def _check_same(self, opening: Comparison) -> None:
        """Raise `DisagreementError`, on every rank, where they do not do the same. Those that began a step have started more than the others then."""
        try:
            opening.check_same()
        except DisagreementError:
            if hasattr(self._transport, "abandon"):
                self._transport.abandon()
            raise
