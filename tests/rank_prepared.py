"""A process that has imported torch with its compiler and hvd_ecsgd, and forks ranks which would import them again:  python rank_prepared.py
LISTENING-SOCKET, for `tests.ranks`. (torch.distributed imports the compiler, too.)

It serves rank_start.py, one child for each connection, for as long as its standard input is open. It has no threads and has started nothing: neither
MPI nor Horovod nor mpi_backend is imported. A child ends when the process that asked for it does; all of them end with this process; and
who loses its parent among their descendants becomes a child of this process, so that `tests.ranks` finds all that a job leaves behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import sys

# Imported as a script: this file's folder is where Python looks first.
import rank_main
from rank_start import ACCEPTED

_LAUNCHERS = (
    "OMPI_",
    "OPAL_",
    "PMIX_",
    "PMI_",
    "PRTE_",
    "HWLOC_",
    "HOROVOD_",
    "TORCHELASTIC_",
    "GROUP_",
    "ROLE_",
    "LOCAL_",
    "MASTER_",
    "NCCL_",
    "TORCH_NCCL_",
)
_OURS = ("MPI_BACKEND_", "HVD_ECSGD_JOB", "HVD_ECSGD_PREPARED", "HVD_ECSGD_REQUIRE_ALL")
_LIBRARIES = ("TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")
_WHOLE = frozenset({"RANK", "WORLD_SIZE", "LD_LIBRARY_PATH", "PWD", "OLDPWD", "SHLVL", "_", "PYTEST_CURRENT_TEST", "PYTEST_VERSION", *_LIBRARIES})
"""Variables, by how their names begin and by name, that may have another value than here: launchers set them, or nothing reads them while torch and
hvd_ecsgd are imported. (mpirun adds its libraries to LD_LIBRARY_PATH; mpi4py finds them without. torch's compiler and scikit-learn set some in a
process that imports them, such as the tests'.) Where any other differs, a rank imports both itself: the interpreter, OpenMP, torch and kernels read
variables of many names."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def differs(environment: dict[str, str]) -> list[str]:
    """The variables with another value than here, of those that must have the same."""
    names = {name for name, _ in environment.items() ^ os.environ.items()}
    return sorted(name for name in names if not name.startswith((*_LAUNCHERS, *_OURS)) and name not in _WHOLE)


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """A request, and the standard streams of who asks."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as rest:
        try:
            return json.loads(rest.read(int.from_bytes(size, "big"))), streams
        except ValueError:
            for stream in streams:
                os.close(stream)
            raise


def serve(listening: socket.socket) -> dict:
    """Fork children until standard input ends. Returns in each child, with its request."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    dead, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[socket.socket, int] = {}
    selector = selectors.DefaultSelector()
    for source in (listening, dead, sys.stdin):
        selector.register(source, selectors.EVENT_READ)

    def bury() -> None:
        """Take the status of who has ended, and tell who asked for it."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                for connection in [c for c, child in children.items() if child == ended[0]]:
                    with contextlib.suppress(OSError):
                        connection.sendall(ended[1].to_bytes(4, "big"))
                    forget(connection)

    def forget(connection: socket.socket) -> None:
        selector.unregister(connection)
        connection.close()
        del children[connection]

    while True:
        for key, _ in selector.select():
            source = key.fileobj
            if source is sys.stdin:
                for child in children.values():
                    os.kill(child, signal.SIGKILL)
                os._exit(0)
            elif source is dead:
                dead.recv(4096)
                bury()
            elif source in children:
                numbers = b""
                with contextlib.suppress(OSError):
                    numbers = source.recv(16)
                for number in numbers or [signal.SIGKILL]:  # an end: the child must not outlive who asked for it
                    os.kill(children[source], number)  # not waited for yet, so this process is still the child
                if not numbers:
                    forget(source)
            elif source is listening:
                connection, _ = listening.accept()
                try:
                    request, streams = receive(connection)
                except (OSError, ValueError):  # who asked has been killed
                    connection.close()
                    continue
                if differs(request["environment"]):
                    connection.close()
                elif child := os.fork():
                    children[connection] = child
                    selector.register(connection, selectors.EVENT_READ)
                    with contextlib.suppress(OSError):
                        connection.sendall(ACCEPTED)
                else:
                    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    selector.close()
                    for opened in (listening, dead, tell, connection, *children):
                        opened.close()
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                        os.close(stream)
                    return request
                for stream in streams:
                    os.close(stream)


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        rank_main.import_torch(compiler=True, also=("torch._dynamo", "hvd_ecsgd"))
        request = serve(listening)
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    # What was random on import, and would be the same on all.
    sys.modules["torch"].default_generator.seed()
    sys.modules["numpy"].random.seed()
    sys.argv = [rank_main.__file__, *request["arguments"]]
    rank_main.main()


if __name__ == "__main__":
    main()
