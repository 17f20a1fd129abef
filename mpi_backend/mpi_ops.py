"""Horovod's module of the same name, for scripts that import from it."""

from __future__ import annotations

from .basics import *  # noqa: F403
from .collectives import *  # noqa: F403
from .compression import Compression as Compression
from .errors import HorovodInternalError as HorovodInternalError
from .process_sets import ProcessSet as ProcessSet
from .process_sets import add_process_set as add_process_set
from .process_sets import global_process_set as global_process_set
from .process_sets import remove_process_set as remove_process_set
from .runtime import init as init
from .runtime import is_initialized as is_initialized
from .runtime import shutdown as shutdown
from .runtime import start_timeline as start_timeline
from .runtime import stop_timeline as stop_timeline
