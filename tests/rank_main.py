"""Runs one Python program as one rank, for `tests.ranks`:  python rank_main.py PROGRAM [ARGUMENT…]

An uncaught exception ends the process at once with its status. Left alone, Python would first run MPI_Finalize, which waits for the other ranks,
and the launcher would notice the dead rank only when they are done. Shortly before the job's time limit every thread's stack is printed, and after a
crash in C too.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import traceback
import types


def rank_name() -> str:
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "HOROVOD_RANK"):
        if name in os.environ:
            return f"rank {os.environ[name]}"
    return f"process {os.getpid()}"


def end(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    sys.argv = sys.argv[1:]
    program = sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(program))
    faulthandler.enable()
    limit = float(os.environ.get("HVD_ECSGD_JOB_DUMP_AT", "0"))
    if limit:
        faulthandler.dump_traceback_later(max(0.1, limit - time.time()), exit=False)

    module = types.ModuleType("__main__")
    module.__file__ = program
    sys.modules["__main__"] = module
    try:
        with open(program, encoding="utf-8") as file:
            code = compile(file.read(), program, "exec")
        exec(code, module.__dict__)
    except SystemExit as error:
        if error.code is None or error.code == 0:
            return
        if isinstance(error.code, int):
            end(error.code)
        print(f"{rank_name()}: {error.code}", file=sys.stderr)
        end(1)
    except BaseException:
        # One write: the lines of several ranks do not mix.
        sys.stderr.write(f"{rank_name()} failed:\n{traceback.format_exc()}")
        end(1)


if __name__ == "__main__":
    main()
