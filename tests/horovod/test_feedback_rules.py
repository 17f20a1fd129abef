"""Rules with momentum inside, on real ranks of an unmodified Horovod."""

from __future__ import annotations

import re

from tests.ranks import horovodrun

METHODS = ["dist_ef_sgd", "comp_skip", "comp_skip-every", "comp_skip-norm", "skip_all_reduce"]


def test_momentum_inside_on_unmodified_horovod() -> None:
    """The simulation's bits on two ranks; momentum in both places and no `attach` are errors."""
    said = horovodrun(2, "tests/horovod/program_feedback_rules.py")
    assert re.findall(r"^passed (.+)$", said, re.MULTILINE) == [*METHODS, "mistakes"]
