"""The paper's claim at full size, on a machine with a GPU that is ours for a while: studies in order of worth.

python -m benchmarks.full_size --minutes 25 --source cifar10.tar.xz --archive full_size.zip

Trains for so many minutes, one study after the other, in this process and in packs, and needs no network. What has
finished goes into the archive once a minute: a few megabytes, without weights. The next call, on any machine, goes on
from the archive. A run that was under way begins anew there. The archive holds each study's report.
"""

import argparse
import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically

PAPER = Path(__file__).resolve().parents[1] / "configs" / "paper"
SMALL = 1 << 19  # bytes of a file that is kept: results, metrics and reports, but no weights
RUNS = "runs"  # a study's folder of runs
SAVE_SECONDS = 60
STOP_SECONDS = 60  # for what is told to stop
START = "from depthmup.launch.cli import main; main()"
SHORT = ("train.samples=256_000", "study.design=adaptive")  # 2,000 steps


@dataclass(frozen=True)
class Step:
    """A study, and a target that is trained after it."""

    config: Path
    overrides: tuple[str, ...] = SHORT
    target: Path | None = None


STEPS = (
    Step(PAPER / "full_conv_resnet.yaml"),
    Step(PAPER / "full_conv_resnet.yaml", (*SHORT, "model.convs_per_branch=2", "study.name=full_conv_resnet_k2")),
    Step(PAPER / "full_conv_resnet.yaml", (*SHORT, "model.norm=batch", "study.name=full_conv_resnet_bn")),
    Step(PAPER / "full_vit.yaml"),
    Step(PAPER / "full_vit.yaml", ("train.samples=1_000_000", "study.design=adaptive", "study.name=full_vit_long")),
    Step(PAPER / "full_conv_resnet.yaml", target=PAPER / "targets" / "full_conv_resnet.yaml"),
)


def find_results(folder: Path) -> Iterator[Path]:
    """The small files of all studies in `folder`; of a run, once it has ended: what is under way comes and goes."""
    for parent, folders, names in os.walk(folder):
        if Path(parent).name == RUNS:
            runs = [Path(parent, name) for name in folders]
            folders[:] = [run.name for run in runs if (run / "done.json").exists() or (run / "failed.json").exists()]
        for path in sorted(Path(parent, name) for name in names):
            wanted = path.is_file() and not path.is_symlink() and path.suffix != ".safetensors"
            if wanted and path.stat().st_size < SMALL:
                yield path


def save(folder: Path, archive: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_LZMA) as kept:
        for path in find_results(folder):
            kept.write(path, path.relative_to(folder))
    write_atomically(archive, content.getvalue())


def restore(archive: Path, folder: Path) -> None:
    """Raises UserError for a file that is no archive."""
    try:
        with zipfile.ZipFile(archive) as kept:
            kept.extractall(folder)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{archive}: not an archive of studies ({error}): name another --archive") from None


def stop_process(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Tells it to stop, and kills it where it does not within STOP_SECONDS."""
    process.send_signal(how)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def train_step(step: Step, folder: Path, data: Sequence[str], archive: Path, deadline: float) -> bool:
    """Whether the study is finished. It is stopped at the deadline."""
    target = ("--target", str(step.target)) if step.target else ()
    overrides = (*step.overrides, *data, f"study.directory={folder}")
    command = ("transfer", str(step.config), "--cluster", "debug", *target, *overrides)
    print("depthmup", *command, flush=True)
    process = subprocess.Popen([sys.executable, "-c", START, *command])
    while process.poll() is None and time.monotonic() < deadline:
        try:
            process.wait(min(SAVE_SECONDS, max(deadline - time.monotonic(), 0)))
        except subprocess.TimeoutExpired:
            save(folder, archive)
    if process.poll() is None:
        # SIGTERM is as Ctrl-C; a job in a shell's background ignores SIGINT, with all that it starts.
        stop_process(process, signal.SIGTERM)
    save(folder, archive)
    return process.returncode == 0


def main(steps: Sequence[Step] = STEPS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--archive", type=Path, required=True, help="what came back from the last call, and its place")
    parser.add_argument("--source", help="images to pack where the studies' shards are missing")
    parser.add_argument("--folder", type=Path, default=Path("runs/full_size"), help="of the studies, on this machine")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.archive.exists():
        restore(arguments.archive, arguments.folder)
    data = [f"data.source={arguments.source}"] if arguments.source else []
    finished = [
        train_step(step, arguments.folder, data, arguments.archive, deadline)
        for step in steps
        if time.monotonic() < deadline  # asked again after each study
    ]
    print(f"{sum(finished)} of {len(steps)} studies are finished; {arguments.archive} has the results")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
