"""The process in which a benchmark runs: one thread, offline, and with big buffers kept."""

import os
import sys


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),  # keep big buffers, as CUDA's caching allocator does
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
    "HF_HUB_OFFLINE": "1",
}


def start_steady() -> None:
    """Start this very command again under `ENVIRONMENT`, unless it runs under it: libc reads it at the start only."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
