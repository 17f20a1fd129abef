"""Ranks that torchrun starts again find each other in a store that still holds what those before them have left."""

from __future__ import annotations

import threading
import time

import pytest
from torch._C._distributed_c10d import HashStore

from hvd_ecsgd import TransportError, torch_backend


def start(store: HashStore, size: int, late: int) -> list[str]:
    """All ranks of one start, of which `late` comes last; what each reads of rank 0's address."""
    found = [""] * size

    def rank(r: int) -> None:
        if r == late:
            time.sleep(0.05)
        own = torch_backend._own_part(store, r, size)
        if r == 0:
            time.sleep(0.05)
            own.set("address", f"start {id(found)}")
        found[r] = own.get("address").decode()

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(found) == {f"start {id(found)}"}
    return found


@pytest.mark.parametrize("late", range(3))
def test_as_many_fewer_and_more_read_what_their_own_start_has_written(late: int) -> None:
    store = HashStore()
    store.set("address", "of nobody who is here")  # what torch's own rendezvous would let them read: the control
    for size in (3, 3, 2, 3, 1):
        assert start(store, size, late) != ["of nobody who is here"] * size


def test_a_rank_that_waits_in_vain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "_PATIENCE", 0.05)
    for rank in range(2):
        with pytest.raises(TransportError, match=r"has waited 0\.05 s for the others"):
            torch_backend._own_part(HashStore(), rank, 2)
