"""Noticing ranks that are gone: a process beside each rank, and the thread of a rank that listens to it."""
