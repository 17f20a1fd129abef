"""Asynchronous training: workers that pull, compute and push compressed gradients without waiting for each other, and servers that hold x.

State machines without a transport: a driver carries the `Message`s. `plan` says what all share, `server` and `worker` are the two sides,
`messages` is what they tell each other, and `step_sizes` says how large a step may be with stale and compressed gradients. `cutoff` needs no servers:
synchronous steps that go on without workers that are late, as `attendance` decides.
"""

from .attendance import Cutoff, best_cutoff
from .cutoff import CutoffWorker
from .messages import Kind, Message
from .plan import Plan, plan_of, shards_of
from .server import Server
from .step_sizes import alpha_of, delay_limit, suggested_step_size
from .worker import Worker

__all__ = ["Cutoff", "CutoffWorker", "Kind", "Message", "Plan", "Server", "Worker"]
__all__ += ["alpha_of", "best_cutoff", "delay_limit", "plan_of", "shards_of", "suggested_step_size"]
