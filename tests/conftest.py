"""One thread a process: `make test` runs two, and threads that wait for each other take the other process's time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
