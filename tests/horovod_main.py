"""horovodrun, for `tests.ranks`, without its look at what Horovod was built with, for which it imports torch each time before it starts a rank.

The scripts in launch/ are tested with horovodrun itself.
"""

from __future__ import annotations

from horovod.runner import launch

launch.gloo_built = lambda verbose=False: True

if __name__ == "__main__":
    launch.run_commandline()
