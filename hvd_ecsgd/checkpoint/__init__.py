"""Checkpoints of a whole training, for the number of workers that saved them or another one."""

from .save_load import Loaded, load_checkpoint, save_checkpoint

__all__ = ["Loaded", "load_checkpoint", "save_checkpoint"]
