"""Runs -> submitit jobs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from launch.config import LaunchConfig
from launch.study import PlannedRun
from launch.worker import Slot

MINUTES_PER_YEAR = 60 * 24 * 365


def num_slots(config: LaunchConfig) -> int:
    """Runs side by side on this machine: as asked for, or one per GPU, or one per core that we may use."""
    if config.slots:
        return config.slots
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(visible.split(",")) if visible else len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return gpus or len(os.sched_getaffinity(0))


def executor_for(config: LaunchConfig, folder: Path) -> submitit.AutoExecutor:
    executor = submitit.AutoExecutor(folder=folder, cluster=config.cluster)
    if config.cluster == "slurm":
        executor.update_parameters(
            timeout_min=config.timeout_min,
            gpus_per_node=config.gpus_per_node,
            cpus_per_task=config.cpus_per_task,
            slurm_partition=config.partition,
            slurm_account=config.account,
            slurm_array_parallelism=config.max_running,
            # srun no longer inherits sbatch's value since Slurm 22.05
            slurm_setup=["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"],
        )
    else:
        executor.update_parameters(timeout_min=MINUTES_PER_YEAR)
    return executor


def submit(runs: Sequence[PlannedRun], config: LaunchConfig, folder: Path) -> list[submitit.Job[Any]]:
    """Submits `runs`: on Slurm one array with a run each, elsewhere as many slots as run side by side."""
    directories = [run.directory.path.absolute() for run in runs]
    executor = executor_for(config, folder)
    if config.cluster == "slurm":
        return executor.map_array(
            lambda slot: slot(), [Slot([directory], config.cpus_per_task) for directory in directories]
        )
    count = 1 if config.cluster == "debug" else min(num_slots(config), len(directories))
    os.environ["OMP_NUM_THREADS"] = "1"  # two threads a process on busy cores were 3 to 6 times slower than one
    return [executor.submit(Slot(directories)) for _ in range(count)]
