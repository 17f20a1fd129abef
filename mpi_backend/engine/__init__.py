"""The communication thread, and what it decides by. Importing this package initialises nothing; its `engine` and `channel` import mpi4py.MPI."""
