"""What an unmodified Horovod needs. `transport` alone imports Horovod, inside functions; the rest works without it."""
