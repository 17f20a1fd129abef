"""Variables that users set: what is none of the values expected is an error that names variable, value and what was expected."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from mpi_backend.environment import seconds, switch, whole_number
from mpi_backend.liveness.interfaces import addresses


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        (switch, None, True),
        (switch, "", True),
        (switch, "0", False),
        (switch, "1", True),
        (lambda name: switch(name, False), "", False),
        (lambda name: seconds(name, 6.0), "", 6.0),
        (lambda name: seconds(name, 6.0), "0", 0.0),
        (lambda name: seconds(name, 6.0, least=1.0), "1.5", 1.5),
        (lambda name: whole_number(name, 7, "a number"), "", 7),
        (lambda name: whole_number(name, 7, "a number"), "0", 0),
    ],
)
def test_what_is_read(read: Callable[[str], Any], value: str | None, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOMETHING", raising=False)
    if value is not None:
        monkeypatch.setenv("SOMETHING", value)
    assert read("SOMETHING") == expected and type(read("SOMETHING")) is type(expected)


@pytest.mark.parametrize("value", ["off", "yes", "2", " 1"])
def test_a_switch_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMETHING", value)
    with pytest.raises(ValueError, match=rf"SOMETHING is '{value}'; expected 0 \(off\) or 1 \(on\)\."):
        switch("SOMETHING")


@pytest.mark.parametrize(("value", "least"), [("soon", 0.0), ("1m", 0.0), ("-1", 0.0), ("nan", 0.0), ("0.5", 1.0)])
def test_seconds_that_are_none(value: str, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMETHING", value)
    with pytest.raises(ValueError, match=rf"SOMETHING is '{value}'; expected a number of seconds{', at least 1' if least else ''}\."):
        seconds("SOMETHING", 6.0, least)


@pytest.mark.parametrize("value", ["4M", "-1", "1.5"])
def test_whole_numbers_that_are_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMETHING", value)
    with pytest.raises(ValueError, match=rf"SOMETHING is '{value}'; expected a number of bytes\."):
        whole_number("SOMETHING", 1, "a number of bytes")


def test_an_interface_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPI_BACKEND_INTERFACE", "no-such-0,10.0.0.0/8")
    with pytest.warns(RuntimeWarning, match=r"MPI_BACKEND_INTERFACE names no-such-0, and .* has .*; signs of life take all of them"):
        addresses()
    monkeypatch.setenv("MPI_BACKEND_INTERFACE", socket.if_nameindex()[0][1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # control
        addresses()
