"""A compressor around another one."""

from __future__ import annotations

from typing import Any

from hvd_ecsgd.protocols import Compressor

__all__ = ["Wrapping"]


class Wrapping:
    """As `inner`, but where a subclass says otherwise."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _of_inner(name: str) -> property:
    return property(lambda self: getattr(self.inner, name))


for _name in vars(Compressor):
    if not _name.startswith("_"):  # what `isinstance` looks for, which does not ask `__getattr__` since Python 3.12
        setattr(Wrapping, _name, _of_inner(_name))
