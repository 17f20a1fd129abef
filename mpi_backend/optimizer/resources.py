"""What the optimizers of this process hold: a transport and a thread each; in the order in which all ranks make them."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from hvd_ecsgd.optimizer import driver_of
from hvd_ecsgd.optimizer.background import Background

from .. import runtime
from ..process_sets import ProcessSet, global_process_set

if TYPE_CHECKING:
    from ..transport import Link, MPITransport, User

__all__ = [
    "abandon_backgrounds", "abandon_transports", "add_optimizer", "carry_on", "close_backgrounds", "close_transports", "move", "new_background",
    "new_transport", "optimizers", "revoke", "tell_dropped",
]  # fmt: skip


@dataclass
class _Made:
    """Communicators that ranks made together, and the transport that has them now, if it is still in use on this rank."""

    link: Link
    transport: Callable[[], MPITransport | None]


_COLLECTED_EVERY = 16
"""Optimizers made between collections of garbage: a dropped optimizer is part of a cycle."""

_made: dict[tuple[int, ...], list[_Made]] = {}
"""By the ranks that share them; in the order in which all of those make them."""
_optimizers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_backgrounds: weakref.WeakSet[Background] = weakref.WeakSet()
_count = 0


def new_background(transport: Any) -> Background | None:
    """A thread for one optimizer with this transport, closed by `shutdown`; None where MPI may not be called from it."""
    if not runtime.context().engine.threaded:
        return None
    background = Background("mpi_backend optimizer", partial(_carried_on, weakref.ref(transport)))
    _backgrounds.add(background)
    return background


def _carried_on(transport: Callable[[], Any]) -> bool:
    """See `Link.carry_on`; of the link that a transport has now."""
    link = getattr(transport(), "link", None)
    return link is not None and link.carry_on()


def _user(optimizer: Callable[[], Any]) -> User | None:
    if (one := optimizer()) is None:
        return None
    from ..transport import User

    driver = driver_of(one)
    return User(driver.step.meeting.called, [name for name, _ in driver.compression.named])


def add_optimizer(optimizer: Any, transport: Any) -> int:
    """Note a DistributedOptimizer, for `join`, and for what is said of its transport; all ranks note theirs in the same order. Its number."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    if (link := getattr(transport, "link", None)) is not None:
        link.user = partial(_user, weakref.ref(optimizer))
    return number


def tell_dropped(waits: bool) -> None:
    """While this rank waits in `join`, those who step an optimizer that it has dropped wait for it in vain: they are told."""
    if (watchdog := runtime.watchdog()) is not None:
        watchdog.tell_dropped([made.link for some in _made.values() for made in some if waits and made.link.user() is None])


def optimizers() -> dict[int, Any]:
    """Those in use, by number. One that only a cycle of references keeps is not, and another rank may have let it go already."""
    gc.collect()
    return {number: optimizer for number, optimizer in sorted(_optimizers.items()) if driver_of(optimizer).listens}


def new_transport(process_set: ProcessSet | None = None) -> MPITransport:
    """A transport of its own for one optimizer, so that two of them need not start their exchanges in the same order on all ranks.

    Collective over the process set (default: all); every rank makes its optimizers in the same order. Communicators that are used no more *on any*
    rank are used again: each says here which those are on it. When a rank's collector runs is its own matter, so its word alone decides nothing. The
    others are closed by `shutdown`. Raises ValueError before init(), and outside of the process set.
    """
    global _count
    from ..transport import Link, MPITransport, NodesTransport, node_ranks, nodes_of

    users = runtime.members(global_process_set if process_set is None else process_set)
    some = _made.setdefault(users.ranks, [])
    _count += 1
    if _count % _COLLECTED_EVERY == 0:
        gc.collect()
    unused = {(i, made.link.idle_at()) for i, made in enumerate(some) if made.transport() is None and made.link.idle_at() is not None}
    # Without agreeing, a rank that has joined, or makes none, would be waited for in silence.
    everyones = runtime.agree("DistributedOptimizer being made", users, extra=unused)
    if common := set.intersection(*everyones):
        made = some[min(common)[0]]
    else:
        assert users.comm is not None
        nodes = nodes_of(users.comm, said) if (said := node_ranks()) else ()
        some.append(made := _Made(Link(users.comm, nodes), lambda: None))
    transport = NodesTransport(made.link) if made.link.nodes else MPITransport(link=made.link)
    made.transport, made.link.user = weakref.ref(transport), lambda: None
    if (watchdog := runtime.watchdog()) is not None:
        watchdog.watch(made.link, users.ranks)
    return transport


def carry_on() -> None:
    """Other ranks may still need what was started here."""
    for made in itertools.chain(*_made.values()):
        if not made.link.abandoned:
            made.link.operations.progress()


def close_backgrounds() -> None:
    """End the threads, after what they have been given."""
    for background in list(_backgrounds):
        background.close()


def abandon_backgrounds() -> None:
    """A rank is gone, and what the threads waited for was revoked: return when they do nothing more of what they have been given."""
    for background in list(_backgrounds):
        background.abandon()


def abandon_transports() -> None:
    """A rank is gone: what optimizers communicate by is of no more use."""
    for made in itertools.chain(*_made.values()):
        made.link.abandon()
    _made.clear()


def revoke() -> None:
    """A rank is gone: what optimizers have in flight fails, on all ranks."""
    for made in itertools.chain(*_made.values()):
        made.link.revoke()


def move(links: Mapping[int, Link]) -> None:
    """Bring the transports of these optimizers, by number, onto other links, among all ranks that there are now. Those before are of no more use."""
    abandon_transports()
    here = runtime.context()
    ranks = tuple(range(here.size))
    for number, link in links.items():
        optimizer = _optimizers[number]
        transport = cast("MPITransport", driver_of(optimizer).step.transport)
        transport.be_on(link)
        link.user = partial(_user, weakref.ref(optimizer))
        _made.setdefault(ranks, []).append(_Made(link, weakref.ref(transport)))
        here.watchdog.watch(link, ranks)


def close_transports() -> None:
    """Complete what is in flight, and give the communicators back; collective."""
    for made in itertools.chain(*_made.values()):
        made.link.close()
    _made.clear()
    _optimizers.clear()
