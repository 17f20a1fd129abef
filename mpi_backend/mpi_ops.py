"""Horovod's module of the same name, for scripts that import from it."""

from __future__ import annotations

from .basics import *  # noqa: F403
from .collectives import *  # noqa: F403
from .compression import Compression as Compression
from .errors import HorovodInternalError as HorovodInternalError
from .lifecycle import init as init
from .lifecycle import shutdown as shutdown
from .lifecycle import start_timeline as start_timeline
from .lifecycle import stop_timeline as stop_timeline
from .optimizer import join as join
from .process_sets import ProcessSet as ProcessSet
from .process_sets import global_process_set as global_process_set
from .runtime import is_initialized as is_initialized
from .sets import add_process_set as add_process_set
from .sets import remove_process_set as remove_process_set
