"""Whether the machine has what the data workers need: looked at before they start, since its lack ends in a bus error,
or in a run that is slow for no reason that anyone sees."""

import os
from pathlib import Path

from data.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
BATCHES_AT_ONCE = 3  # two of each worker wait (torch's prefetch_factor), one is in use


def check_shared_memory(batch_bytes: int) -> None:
    """Workers hand batches over in shared memory. Raises UserError where it has no room for a process's batches."""
    if not SHARED_MEMORY.exists():  # no Linux
        return
    status, needed = os.statvfs(SHARED_MEMORY), batch_bytes * BATCHES_AT_ONCE
    if (free := status.f_bavail * status.f_frsize) < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, but data workers pass {needed / 1e6:.0f} MB through it: "
            "enlarge it (docker: --shm-size=8g), or set data.num_workers=0"
        )


def too_few_cpus(num_workers: int) -> str | None:
    """What to do where the workers have fewer CPUs than they are; None where they have enough."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cpus >= num_workers:
        return None
    return (
        f"{num_workers} data workers share {cpus} CPU(s): ask for more a task (launch.cpus_per_task; "
        f"srun --cpus-per-task, which sbatch's own does not set), or set data.num_workers={cpus}"
    )
