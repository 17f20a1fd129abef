"""What compression does to a training, step by step: `Logger` writes it down, `hvd-ecsgd report` and `hvd-ecsgd watch` show it."""

from .fields import FIELDS, Field
from .logger import Logger
from .sinks import JsonLines, Progress, Sink, TensorBoard

__all__ = ["FIELDS", "Field", "JsonLines", "Logger", "Progress", "Sink", "TensorBoard"]
