"""How a check that fails on a rank is told, while the other ranks may wait for that rank in the check."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import NoReturn

from tests.rank_main import rank_name

__all__ = ["end_all"]

_FOR_THE_OTHERS = 1.0
"""Seconds in which other ranks, on which the same check fails, may say why."""


def end_all(check: str) -> NoReturn:
    """Within `except`: say what was raised, and end this process, by which the launcher ends the job.

    To exchange verdicts first would hide the cause until the time limit: a rank on which nothing was raised may wait for what this one never sends.
    """
    sys.stdout.flush()
    sys.stderr.write(f"FAILED {check}, {rank_name()}:\n{traceback.format_exc()}")
    sys.stderr.flush()
    time.sleep(_FOR_THE_OTHERS)
    os._exit(1)
