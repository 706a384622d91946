"""All that is to be measured on a GPU, in order of worth, for so many minutes: for a machine that is ours for a while.

    python -m benchmarks.on_gpu --minutes 28 --out results --source cifar10.tar.xz
    python -m benchmarks.on_gpu --minutes 10 --out results --toy      # on a CPU: does every command run to its end?

Each command writes to a file of its own in --out, line by line, so that what is there stays when the time is up. A
later call, with the files of the last, leaves out what has ended and begins again with what had not. No network is
needed.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.full_size import STOP_SECONDS, stop_process

ENDED = "ended.json"  # of --out: the exit code and seconds of each command that came to its end


@dataclass(frozen=True)
class Command:
    """arguments: of python. toy: what a CPU runs in its place. minutes: most that it may take."""

    name: str
    arguments: tuple[str, ...]
    toy: tuple[str, ...]
    minutes: float = 60


TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py")
TINY = ("--models", "tiny", "--batch", "8", "--steps", "1", "--rounds", "2", "--compile", "off")
IDEAS = ("-m", "benchmarks.step_ideas")
FEW_IDEAS = ("--ideas", "attention: flash", "196 tokens (another network)")
LITTLE = (*TINY, "--workers", "1", "--images", "16")
COMMANDS = (
    Command("nvjpeg tests", (*TESTS, "-k", "nvjpeg or decodes"), (*TESTS, "-k", "nvjpeg or decodes"), 5),
    Command("whole runs", ("-m", "benchmarks.whole_runs"), ("-m", "benchmarks.whole_runs", *LITTLE), 8),
    Command("ideas, ViT-S", (*IDEAS, "--models", "vit_s16"), (*IDEAS, *TINY, *FEW_IDEAS), 12),
    Command(
        "speed of networks",
        ("-m", "benchmarks.train_throughput"),
        ("-m", "benchmarks.train_throughput", *TINY, "--precision", "fp32"),
        6,
    ),
    Command(
        "packs",
        ("-m", "benchmarks.packed", "--seconds", "500"),
        ("-m", "benchmarks.packed", "--quick", "--widths", "16", "--batch", "4", "--seconds", "45"),
        12,
    ),
    Command("ideas, ViT-B", (*IDEAS, "--models", "vit_b16"), (*IDEAS, *TINY, "--ideas", "compile: block"), 12),
    Command("tests", TESTS, (*TESTS, "-k", "pinned"), 12),
)


def run(command: list[str], log: Path, seconds: float) -> int | None:
    """Its exit code; None where it was stopped because its time was up. What it says goes to `log`."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("w") as said:
        print(shlex.join(command), file=said, flush=True)
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            return process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            stop_process(process, signal.SIGINT)
        print("\nstopped: its time was up", file=said)
        return None


def main(commands: tuple[Command, ...] = COMMANDS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is found; a later call goes on from it")
    parser.add_argument("--source", help="images for the studies at full size, which take the time that is left")
    parser.add_argument("--toy", action="store_true", help="a CPU's sizes")
    arguments = parser.parse_args()
    if not arguments.toy and not torch.cuda.is_available():  # the tests would be skipped, and count as done
        parser.error("torch sees no GPU here; --toy tries the commands on a CPU")
    # A shell has a job in the background ignore SIGINT, and what that starts would do so, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / ENDED
    ended: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    for command in commands:
        left = deadline - time.monotonic()
        if command.name in ended or left <= 0:
            continue
        words = [sys.executable, *(command.toy if arguments.toy else command.arguments)]
        started = time.monotonic()
        code = run(words, arguments.out / f"{command.name.replace(' ', '_')}.txt", min(left, 60 * command.minutes))
        spent = time.monotonic() - started
        if code is not None:
            ended[command.name] = {"exit code": code, "seconds": round(spent)}
            file.write_text(json.dumps(ended, indent=1))
        print(
            f"{command.name}: {'its time was up' if code is None else f'exit code {code}'}, {spent:.0f} s", flush=True
        )
    left = (deadline - time.monotonic()) / 60
    if arguments.source and left > 0:
        studies = ["-m", "benchmarks.full_size", "--minutes", f"{left:.2f}", "--source", arguments.source]
        archive = ["--archive", str(arguments.out / "full_size.zip")]
        run([sys.executable, *studies, *archive], arguments.out / "full_size.txt", 60 * left + 2 * STOP_SECONDS)
    print(f"{len(ended)} of {len(commands)} commands have ended: {arguments.out}")


if __name__ == "__main__":
    main()
