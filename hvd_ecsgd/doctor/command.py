"""`hvd-ecsgd doctor` and `hvd-ecsgd env`: print the findings."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence

from ..errors import CompressionError
from .findings import Finding, State
from .look import LOOKS, versions
from .processes import environment_of_ranks
from .roads import ROADS, try_road

__all__ = ["add_arguments", "doctor", "environment", "examine"]

_OF_A_RANK = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "HOROVOD_SIZE", "TORCHELASTIC_RUN_ID")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `doctor`."""
    parser.add_argument(
        "--roads",
        nargs="*",
        choices=list(ROADS),
        metavar="ROAD",
        help=f"to be tried, which must work: of {', '.join(ROADS)}",
    )
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a road's trial is ended (default 60)")
    parser.add_argument("--json", action="store_true", help="print JSON: ok, and the findings with part, name, what, state and remedy")


def examine(roads: Sequence[str], limit: float, variables: Mapping[str, str]) -> list[Finding]:
    """Every finding, in the order in which they are printed. `variables`: the environment; this process's is not read, nor changed.

    Raises CompressionError on a rank of a job, since jobs do not start in jobs, and for a limit that is none.
    """
    if not limit > 0:
        raise CompressionError(f"doctor: --limit must be a number of seconds above 0, got {limit}.")
    if inside := [name for name in _OF_A_RANK if name in variables]:
        raise CompressionError(f"doctor: this process is a rank of a job ({inside[0]} is set), and starts jobs itself; run it without a launcher.")
    environment = environment_of_ranks(variables)
    return [*(finding for look in LOOKS for finding in look(environment)), *(try_road(road, limit, environment) for road in dict.fromkeys(roads))]


def doctor(options: argparse.Namespace) -> int:
    """Look, try, print; returns the exit status: 0 where all that is there works.

    It is 1 where something is broken, where a road that `--roads` names is not there, and where no road is; 2 where it cannot be called like this.
    """
    named = options.roads is not None
    try:
        findings = examine(options.roads if named else list(ROADS), options.limit, os.environ)
    except CompressionError as wrong_use:
        print(f"hvd-ecsgd {wrong_use}", file=sys.stderr)
        return 2
    tried = [f for f in findings if f.part == "roads"]
    works = [f.name for f in tried if f.state is State.OK]
    missing = [f for f in tried if f.state is State.ABSENT] if named or not works else []
    faults = [*(f for f in findings if f.state is State.BROKEN), *missing]
    if options.json:
        print(json.dumps({"ok": not faults, "findings": [f.as_json() for f in findings]}, indent=1))
        return 1 if faults else 0
    print(f"On {platform.node()}:")
    part = ""
    for f in findings:
        if f.part != part:
            part = f.part
            print(f"\n{part}")
        print(f"  {f.state.value:<7} {f.name}: {f.what}")
        if f.remedy:
            print(f"          → {f.remedy}")
    print(f"\nReady to train: {', '.join(works) or ('on no road' if tried else 'not known, as no road was tried')}.")
    if faults:
        print(f"To be mended: {', '.join(f.name for f in faults)}; the arrows above say how.")
    return 1 if faults else 0


def environment() -> int:
    """Print the versions a bug report needs. Imports neither Horovod nor MPI."""
    for f in versions(environment_of_ranks(os.environ)):
        print(f"{f.name:<10} {f.what}")
    return 0
