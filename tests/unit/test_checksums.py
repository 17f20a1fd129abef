"""Checksums of messages, and what asynchronous messages and collectives do by them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_ecsgd.asynchronous import Kind, Message
from hvd_ecsgd.errors import TransportError
from hvd_ecsgd.transport.checksums import checksum, checksum_of


@given(st.binary(min_size=1, max_size=70), st.data())
def test_any_other_bit_is_another_checksum(content: bytes, data: st.DataObject) -> None:
    """In whatever place, also in the last bytes, which fill no word, and at addresses that no word begins at."""
    start = data.draw(st.integers(0, 7))
    buffer = torch.frombuffer(bytearray(b"." * start + content), dtype=torch.uint8)[start:]
    before = checksum(buffer)
    assert before == checksum(buffer.clone()) and 0 <= before < 2**64
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    buffer[place] ^= 1 << bit
    assert checksum(buffer) != before


def test_types_order_and_lengths_count() -> None:
    a, b = torch.arange(5.0), torch.arange(3, dtype=torch.bfloat16)
    assert checksum(a) == checksum(a.view(torch.uint8)) and checksum(torch.zeros(0)) == 0
    assert len({checksum_of(some) for some in ([a, b], [b, a], [a], [a, b, torch.zeros(1)], [])}) == 5
    assert checksum(torch.zeros(4)) != checksum(torch.zeros(5))


def test_an_asynchronous_message_that_has_changed_is_refused() -> None:
    """Its payloads, by whoever has received them; its head, wherever a bit of it is another one."""
    message = Message(Kind.PUSH, 1, 2, (0.1,), (3,), [torch.arange(5.0), torch.zeros(0), torch.arange(3, dtype=torch.uint8)])
    head = message.head()
    for place in range(8 * len(head)):
        changed = bytearray(head)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(TransportError, match="damaged"):
            Message.of_head(bytes(changed), most=1 << 40)
    arrived = Message.of_head(head, most=64)
    for target, payload in zip(arrived.payloads, message.payloads, strict=True):
        target.copy_(payload)
    arrived.check(1)
    arrived.payloads[2][1] ^= 8
    with pytest.raises(TransportError, match="payloads of a PUSH of rank 1 have changed on their way"):
        arrived.check(1)
    message.check(0)  # what did not come by a head has nothing to be compared with
