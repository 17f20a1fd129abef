"""A rank at the cost of a fork:  python -I -S rank_start.py PROGRAM [ARGUMENT…], for `tests.ranks`.

Asks a prepared process (rank_prepared.py) to fork a child which is the rank, with what this process has: environment, working directory, standard
streams. Until that child ends, this process passes on to it the signals that it gets, and then ends as the child did. The child does not outlive it.
Where the prepared process is not to be had or does not fit, this process becomes rank_main.py, which imports torch. So it imports very little itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys

PREPARED = "HVD_ECSGD_PREPARED"
"""The variable with where the prepared processes listen, without the last digit of the name."""
RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "HOROVOD_RANK", "RANK")
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
ACCEPTED = b"+"


def main() -> None:
    rank = next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)
    # Two prepared processes take turns, as a process's order of sets of strings is its own, and ranks should not agree on it.
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(f"{os.environ[PREPARED]}{rank % 2}")
            request = json.dumps({"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
            socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
            connection.sendall(request)
            accepted = connection.recv(1) == ACCEPTED
        except OSError:
            accepted = False
        if accepted:
            for number in PASSED_ON:
                signal.signal(number, lambda number, _: pass_on(connection, number))
            status = connection.makefile("rb").read(4)
            if len(status) < 4:
                sys.exit(f"{__file__}: the prepared process has died, and the rank with it.")
            end_like(int.from_bytes(status, "big"))
    os.execv(sys.executable, [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "rank_main.py"), *sys.argv[1:]])


def pass_on(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the rank has just ended
        connection.send(bytes([number]))


def end_like(status: int) -> None:
    """End with what `os.waitpid` said of another process."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
