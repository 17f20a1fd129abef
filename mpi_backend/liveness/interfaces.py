"""Which addresses of this machine signs of life may take."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import warnings
from pathlib import Path

__all__ = ["addresses", "network_identity"]


def network_identity() -> str:
    """Equal for processes that reach each other by 127.0.0.1."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


def addresses() -> list[str]:
    """This machine's IPv4 addresses but the loopback's, of the interfaces that were named, or of all."""
    names = [name for _, name in socket.if_nameindex()]
    ours = [entry for entry in os.environ.get("MPI_BACKEND_INTERFACE", "").split(",") if entry]
    asked = ours or os.environ.get("OMPI_MCA_btl_tcp_if_include", "").split(",")  # noqa: SIM112
    if absent := [entry for entry in ours if "/" not in entry and entry not in names]:
        warnings.warn(
            f"MPI_BACKEND_INTERFACE names {', '.join(absent)}, and {socket.gethostname()} has {', '.join(names)}; signs of life take all of them.",
            RuntimeWarning,
            stacklevel=5,
        )
    networks = [ipaddress.ip_network(entry, strict=False) for entry in asked if "/" in entry]
    names = [name for name in names if name in asked] or names
    found = []
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for name in names:
                with contextlib.suppress(OSError):  # no IPv4 address
                    reply = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR of Linux
                    found.append(socket.inet_ntoa(reply[20:24]))
    except ImportError:
        pass  # not a POSIX system: by its name, below
    if not found:
        with contextlib.suppress(OSError):  # no name server knows it: other machines cannot watch this one, which their ranks say
            found = [socket.gethostbyname(socket.gethostname())]
    usable = [address for address in dict.fromkeys(found) if not address.startswith("127.")]
    return [a for a in usable if any(ipaddress.ip_address(a) in network for network in networks)] or usable
