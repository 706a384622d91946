"""All that is to be measured on a GPU, in order of worth, for so many minutes: for a machine that is ours for a while.

    python -m benchmarks.on_gpu --minutes 28 --out results --source cifar10.tar.xz
    python -m benchmarks.on_gpu --minutes 10 --out results --toy      # on a CPU: does every command run to its end?

What they say goes to one file of --out, line by line, so that what is there stays when the time is up; beside it are
ended.json and full_size.zip, and nothing else. A later call with these files, on any machine, leaves out what has ended
and the rows of tables that have figures. What failed is tried once more, last. No network is needed; what a machine
lacks is said before anything is measured.
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.full_size import STOP_SECONDS, stop_process

LOG = "on_gpu.txt"  # of --out: what all commands say
ENDED = "ended.json"  # of --out: exit code, seconds and number of calls of each command that came to its end
MODULES = "depthmup timm pydantic yaml numpy scipy PIL simplejpeg webdataset submitit click rich fsspec sklearn pytest"


@dataclass(frozen=True)
class Command:
    """arguments: of python. toy: what a CPU runs in its place. minutes: most that it may take in one call. in_rows: a
    later call goes on with the rows that have no figures (benchmarks.rows)."""

    name: str
    arguments: tuple[str, ...]
    toy: tuple[str, ...]
    minutes: float = 60
    in_rows: bool = False


TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py")
TINY = ("--models", "tiny", "--batch", "8", "--steps", "1", "--rounds", "2", "--compile", "off")
IDEAS = ("-m", "benchmarks.step_ideas")
FEW_IDEAS = ("--ideas", "attention: flash", "196 tokens (another network)")
LITTLE = (*TINY, "--workers", "1", "--images", "16")
COMMANDS = (
    Command("nvjpeg tests", (*TESTS, "-k", "nvjpeg or decodes"), (*TESTS, "-k", "nvjpeg or decodes"), 5),
    Command("whole runs", ("-m", "benchmarks.whole_runs"), ("-m", "benchmarks.whole_runs", *LITTLE), 8),
    Command("ideas, ViT-S", (*IDEAS, "--models", "vit_s16"), (*IDEAS, *TINY, *FEW_IDEAS), 12, in_rows=True),
    Command(
        "speed of networks",
        ("-m", "benchmarks.train_throughput"),
        ("-m", "benchmarks.train_throughput", *TINY, "--precision", "fp32"),
        6,
    ),
    Command(
        "packs",
        ("-m", "benchmarks.packed", "--seconds", "3600"),
        ("-m", "benchmarks.packed", "--quick", "--widths", "16", "--batch", "4", "--seconds", "3600"),
        12,
        in_rows=True,
    ),
    Command(
        "ideas, ViT-B",
        (*IDEAS, "--models", "vit_b16"),
        (*IDEAS, *TINY, "--ideas", "compile: block"),
        12,
        in_rows=True,
    ),
    Command("tests", TESTS, (*TESTS, "-k", "pinned"), 12),
)


def find_obstacle(toy: bool, source: str | None) -> str | None:
    """What would make a command fail that has begun."""
    if missing := [name for name in MODULES.split() if importlib.util.find_spec(name) is None]:
        return f"not installed for {sys.executable}: {', '.join(missing)}"
    if source and not source.startswith("sklearn:") and not Path(source).exists():
        return f"--source {source} does not exist"
    if toy or torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
        why = "no device"
    except (RuntimeError, AssertionError) as error:  # an old driver, a torch for CPUs
        why = str(error).partition("\n")[0]
    return f"torch sees no GPU here ({why}); --toy tries the commands on a CPU"


def run(command: list[str], log: Path, seconds: float) -> int | None:
    """Its exit code; None where it was stopped because its time was up. What it says goes to the end of `log`."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("a") as said:
        print(f"\n== {shlex.join(command)}", file=said, flush=True)
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            stop_process(process, signal.SIGINT)
            print("\nstopped: its time was up", file=said)
            return None
        finally:  # also its workers and compilers, which could hold the GPU
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def main(commands: tuple[Command, ...] = COMMANDS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is found; a later call goes on from it")
    parser.add_argument("--source", help="images for the studies at full size, which take the time that is left")
    parser.add_argument("--toy", action="store_true", help="a CPU's sizes")
    arguments = parser.parse_args()
    if obstacle := find_obstacle(arguments.toy, arguments.source):
        parser.error(obstacle)
    # A shell has a job in the background ignore SIGINT, and what that starts would do so, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so ends what was started
    deadline = time.monotonic() + 60 * arguments.minutes
    out = arguments.out / "toy" if arguments.toy else arguments.out
    out.mkdir(parents=True, exist_ok=True)
    file, log = out / ENDED, out / LOG
    ended: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    again = [
        one for one in commands if one.name in ended and ended[one.name]["exit code"] and ended[one.name]["calls"] < 2
    ]
    for command in [*(one for one in commands if one.name not in ended), *again]:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        words = [sys.executable, *(command.toy if arguments.toy else command.arguments)]
        words += ["--after", str(log)] if command.in_rows else []
        started = time.monotonic()
        code = run(words, log, min(left, 60 * command.minutes))
        spent = time.monotonic() - started
        if code is not None:
            calls = ended.get(command.name, {"calls": 0})["calls"] + 1
            ended[command.name] = {"exit code": code, "seconds": round(spent), "calls": calls}
            file.write_text(json.dumps(ended, indent=1))
        print(
            f"{command.name}: {'its time was up' if code is None else f'exit code {code}'}, {spent:.0f} s", flush=True
        )
    left = (deadline - time.monotonic()) / 60
    if arguments.source and left > 0:
        studies = ["-m", "benchmarks.full_size", "--minutes", f"{left:.2f}", "--source", arguments.source]
        archive = ["--archive", str(out / "full_size.zip")]
        run([sys.executable, *studies, *archive], log, 60 * left + 2 * STOP_SECONDS)
    print(f"{len(ended)} of {len(commands)} commands have ended: {out}")


if __name__ == "__main__":
    main()
