"""What a study of many runs costs its user and Slurm. Run: python benchmarks/queue_scale.py [--runs N] [--nodes N]

Brings up a real slurmctld of its own with so many nodes that have no slurmd (kind CLOUD): jobs get nodes, wait for them
to boot for ever, and train nothing. One run per job, `launch.max_running` is the number of nodes. For each command: its
processor seconds and wall seconds, how often it called each command of Slurm, and for how long slurmctld was busy with
what was asked meanwhile. Needs root, and some GB of memory.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
START = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from depthmup.launch.cli import main; main()"
POINTS = 100  # of a study with one seed

from depthmup.data.pack import pack  # noqa: E402  (behind the path)
from slurm_cluster import Cluster, start, wait_for  # noqa: E402  (behind the path, on which it is found)


def write_study(folder: Path, runs: int, nodes: int) -> Path:
    """Ten sizes of network, ten values, and as many seeds as give `runs` runs, on packed digits."""
    pack("sklearn:digits", folder / "digits", validation_share=0.2)
    size = {"width": 8, "depth": 3}
    model = {"family": "conv_resnet", **size, "base_width": 8, "base_depth": 3, "num_classes": 10}
    content = {
        "model": {**model, "image_size": 8, "in_channels": 1},
        "optimizer": {"name": "sgd", "lr": 0.0625},
        "data": {"name": "digits", "root": str(folder / "digits"), "num_streams": 16},
        "train": {"samples": 640, "global_batch_size": 32, "pack": 1},  # a job for each run, as wider networks have
        "launch": {"cluster": "slurm", "partition": "cloud", "max_running": nodes},
        "study": {
            "name": "many",
            "directory": str(folder / "runs"),
            "design": "grid",
            "parameterizations": ["sp"],
            "sizes": [{"width": 8, "depth": 3 * number} for number in range(1, 11)],
            "values": {"first": 2**-9, "last": 1},
            "seeds": list(range(runs // POINTS)),
        },
    }
    path = folder / "many.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def count_calls(folder: Path, cluster: Cluster) -> Path:
    """Puts stand-ins before Slurm's commands on the cluster's PATH, which note each call in the file returned."""
    calls, stand_ins = folder / "calls", folder / "bin"
    stand_ins.mkdir()
    for name in ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacct"):
        real = cluster.call("which", name)
        file = stand_ins / name
        file.write_text(f'#!/bin/sh\necho {name} >> {calls}\nexec {real} "$@"\n')
        file.chmod(0o755)
    cluster.environment["PATH"] = f"{stand_ins}:{cluster.environment['PATH']}"
    return calls


def controller_seconds(cluster: Cluster) -> float:
    """For how long slurmctld was busy with what users' commands asked since `sdiag --reset`."""
    said = cluster.call("sdiag").split("statistics by message type")[1].split("statistics by user")[0]
    users = re.findall(r"(REQUEST_(?:SUBMIT|JOB|UPDATE_JOB|KILL|CANCEL|BUILD)\w*).*?total_time:(\d+)", said)
    return sum(int(microseconds) for _, microseconds in users) / 1e6


def measure(verb: str, file: Path, cluster: Cluster, calls: Path) -> str:
    """Runs the command, prints its row of the table, and returns what it printed."""
    calls.write_text("")
    cluster.call("sdiag", "--reset", root=True)
    used, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-c", START, verb, str(file)]
    said = subprocess.run(command, check=True, env=cluster.environment, stdout=subprocess.PIPE, text=True).stdout
    wall, now = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    asked = ", ".join(f"{count} {name}" for name, count in Counter(calls.read_text().split()).items()) or "-"
    print(f"| `{verb}` | {processor:.1f} | {wall:.0f} | {asked} | {controller_seconds(cluster):.2f} |", flush=True)
    return said


def measure_all(file: Path, cluster: Cluster, calls: Path) -> None:
    print("| command | processor seconds | wall seconds | Slurm's commands | seconds in slurmctld |")
    print("|---|---|---|---|---|")
    measure("plan", file, cluster, calls)
    measure("launch", file, cluster, calls)
    wait_for(lambda: "CONFIGURING" in cluster.call("squeue", "--noheader", "--states=CF", "--format=%T"))
    said = measure("status", file, cluster, calls)
    measure("cancel", file, cluster, calls)
    print(f"\nWhat `status` printed:\n\n{said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000, help=f"a multiple of {POINTS}")
    parser.add_argument("--nodes", type=int, default=1000)
    arguments = parser.parse_args()
    os.environ["SLURM_TEST_CLOUD"] = str(arguments.nodes)
    os.environ["SLURM_TEST_ARRAY"] = "1001"  # Slurm's default
    os.environ["SLURM_TEST_JOBS"] = str(2 * arguments.runs + 10_000)
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name
        file = write_study(Path(name), arguments.runs, arguments.nodes)
        for cluster in start():
            measure_all(file, cluster, count_calls(Path(name), cluster))


if __name__ == "__main__":
    main()
