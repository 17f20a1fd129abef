"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum

__all__ = ["Finding", "State"]


class State(Enum):
    """Of what was looked for."""

    OK = "ok"
    ABSENT = "absent"
    """It is not there, which is no fault: there is more than one way to train."""
    BROKEN = "broken"
    """It is there and does not work; the exit status says so."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    part: str
    name: str
    what: str
    """What was found, in words."""
    state: State = State.OK
    remedy: str = ""
    """What to do; never empty for what is broken."""

    def as_json(self) -> dict[str, str]:
        """The fields as strings."""
        return {**asdict(self), "state": self.state.value}
