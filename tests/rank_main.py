"""Runs one Python program as one rank, for `tests.ranks`:  python rank_main.py [--bare] PROGRAM [ARGUMENT…]

An uncaught exception ends the process at once with its status. Left alone, Python would first run MPI_Finalize, which waits for the other ranks,
and the launcher would notice the dead rank only when they are done. Shortly before the job's time limit every thread's stack is printed, and after a
crash in C too. With --bare all of that is left to Python.

A start costs little beside importing torch, so that is made short. Nothing that torch makes on import is garbage: collecting is off meanwhile, and
leaves it out later and at the end. And the first optimizer of a process would import torch's compiler, which takes as long again, only to tell it to
leave the optimizer's methods alone; a program that compiles nothing gets a stand-in.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import sys
import time
import traceback
import types
from collections.abc import Iterable
from typing import Any


def rank_name() -> str:
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "HOROVOD_RANK"):
        if name in os.environ:
            return f"rank {os.environ[name]}"
    return f"process {os.getpid()}"


class NoCompiler(types.ModuleType):
    """`torch._dynamo` where nothing is compiled. Asked for more, it gives way to the real one."""

    @staticmethod
    def disable(function: Any, *_: Any, **__: Any) -> Any:
        return function

    @staticmethod
    def graph_break(*_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `inspect` asks every module for some
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def compiles(text: str) -> bool:
    """Whether this program needs torch's compiler."""
    return "torch.compile" in text or "transformers" in text


def imports_torch(text: str) -> bool:
    """Whether this program does."""
    return any(name in text for name in ("torch", "mpi_backend", "hvd_ecsgd"))


def import_torch(compiler: bool, also: Iterable[str] = ()) -> None:
    """Do so, with torch's compiler or with the stand-in, and import these modules, too. Nothing is done where torch is imported already."""
    if "torch" in sys.modules:
        return
    if not compiler:
        sys.modules["torch._dynamo"] = NoCompiler("torch._dynamo")
    gc.disable()
    for name in ("torch", *also):
        importlib.import_module(name)
    gc.freeze()
    gc.enable()


def end(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    bare = sys.argv[1] == "--bare"
    sys.argv = sys.argv[1 + bare :]
    program = sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(program))
    module = types.ModuleType("__main__")
    module.__file__ = program
    sys.modules["__main__"] = module
    if bare:
        run(program, module)
        return

    faulthandler.enable()
    limit = float(os.environ.get("HVD_ECSGD_JOB_DUMP_AT", "0"))
    if limit:
        faulthandler.dump_traceback_later(max(0.1, limit - time.time()), exit=False)
    try:
        run(program, module)
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


def run(program: str, module: types.ModuleType) -> None:
    with open(program, encoding="utf-8") as file:
        text = file.read()
    code = compile(text, program, "exec")
    if imports_torch(text):
        import_torch(compiles(text))
    exec(code, module.__dict__)


if __name__ == "__main__":
    main()
