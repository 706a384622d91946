"""How long the launcher itself takes. Run: python benchmarks/launch.py [--slurm]   (--slurm brings up a local cluster)

Medians of several processes, in seconds, beside what must be reached.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
START = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from depthmup.launch.cli import main; main()"


def study(folder: Path, name: str, seeds: int, **launch: Any) -> Path:
    """A study of 10 * 10 * `seeds` runs on the digits."""
    content = {
        "model": {"family": "conv_resnet", "width": 8, "depth": 3, "base_width": 8, "base_depth": 3}
        | {"num_classes": 10, "image_size": 8, "in_channels": 1},
        "optimizer": {"name": "sgd", "lr": 0.0625},
        "data": {"name": "digits", "root": str(folder / "shards"), "source": "sklearn:digits"}
        | {"validation_share": 0.2, "num_streams": 32},
        "train": {"samples": 640, "global_batch_size": 32, "device": "cpu"},
        "launch": launch,
        "study": {
            "name": name,
            "directory": str(folder / "runs"),
            "parameterizations": ["sp", "depth_mup"],
            "sizes": [{"width": 8, "depth": depth} for depth in (3, 6, 9, 12, 15)],
            "values": {"first": 2**-9, "last": 1},
            "seeds": list(range(seeds)),
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def seconds(*arguments: Any, environment: dict[str, str] | None = None) -> float:
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", START, *map(str, arguments)], check=True, env=environment, stdout=subprocess.DEVNULL
    )
    return time.monotonic() - started


def show(what: str, times: list[float], limit: float) -> None:
    print(f"{what:52} {statistics.median(times):6.2f} s   (must: under {limit:g} s)", flush=True)


def on_this_machine(folder: Path) -> None:
    show("depthmup --help", [seconds("--help") for _ in range(5)], 0.5)
    file = study(folder, "plan", seeds=50)
    cold = seconds("plan", file)
    show("plan of 5,000 runs", [seconds("plan", file) for _ in range(3)], 2)
    print(f"{'  the first time':52} {cold:6.2f} s")
    check = f"{START.removesuffix('main()')}\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    for verb in ("plan", "status"):
        command = [sys.executable, "-c", check, verb, str(file)]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stderr.split()[-1]
        print(f"{verb} imports torch: {found}")


def on_slurm(folder: Path) -> None:
    from slurm_cluster import start

    os.environ["SLURM_TEST_ARRAY"] = "1001"  # Slurm's default
    for cluster in start():
        file = study(folder, "thousand", seeds=10, cluster="slurm", sbatch={"hold": True})
        seconds("plan", file)
        launched = seconds("launch", file, "data.root=" + str(folder / "shards"), environment=cluster.environment)
        show("launch of 1,000 runs, with the images packed first", [launched], 5)
        cluster.call("scancel", "--user", cluster.call("id", "-un"))
        again = seconds("launch", file, environment=cluster.environment)
        show("launch of 1,000 runs in one array", [again], 5)
        show("status of 1,000 runs", [seconds("status", file, environment=cluster.environment) for _ in range(3)], 2)
        cluster.call("scancel", "--user", cluster.call("id", "-un"))
        requeue(cluster, folder)


def requeue(cluster: Any, folder: Path) -> None:
    """Signal to the first new step, split by part."""
    file = study(folder, "requeue", seeds=1, cluster="slurm")
    content = yaml.safe_load(file.read_text())
    del content["study"]
    content["train"] |= {"samples": 32 * 20000, "log_every": 5}
    file.write_text(yaml.safe_dump(content))
    subprocess.run(
        [sys.executable, "-c", START, "launch", str(file)], check=True, env=cluster.environment, cwd=folder,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    job = json.loads(next((folder / "runs" / "requeue" / "jobs").glob("*/job.json")).read_text())["job_id"]
    (run,) = (folder / "runs" / "requeue" / "runs").iterdir()

    def lines(name: str) -> list[dict[str, Any]]:
        path = run / name
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def wait_until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            if time.monotonic() > deadline or (run / "failed.json").exists():
                sys.exit(f"the run did not go on: {cluster.call('squeue')}\n{(run / 'log-0.txt').read_text()}")
            time.sleep(0.05)

    wait_until(lambda: len(lines("metrics.jsonl")) >= 3)
    signalled = time.time()
    cluster.call("scancel", "--signal=USR2", f"{job}_0")
    wait_until(lambda: len(lines("attempts.jsonl")) >= 3)
    _, saved, started = lines("attempts.jsonl")
    wait_until(lambda: lines("metrics.jsonl")[-1]["step"] > started["step"])
    stepped = time.time()
    show("requeue: signal to first new metrics line", [stepped - signalled], 30)
    for part, value in (
        ("finish the step and save", saved["time"] - signalled),
        ("Slurm: requeue, hold, start", started["time"] - saved["time"]),
        ("import, load, first steps", stepped - started["time"]),
    ):
        print(f"  {part:50} {value:6.2f} s")
    cluster.call("scancel", job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slurm", action="store_true", help="also what needs a cluster, which it brings up itself")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name
        on_this_machine(Path(name))
        if arguments.slurm:
            on_slurm(Path(name))


if __name__ == "__main__":
    main()
