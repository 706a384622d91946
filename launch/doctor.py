"""`depthmup doctor`: what this machine has, what is missing, and what to do about it."""

import fcntl
import importlib.util
import netrc
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from depthmup.data.lock import NoLocks, flock
from depthmup.launch.jobs import probe
from depthmup.launch.jobs.slurm import SlurmError
from depthmup.launch.paths import quote_command

PACKAGES = ("torch", "timm", "webdataset", "submitit")
EXTRAS = {  # package: extra
    "scikit-learn": "demo",
    "optuna": "tune",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "s3fs": "remote",
    "deepspeed": "deepspeed",
}
LEAST_SHARED_GB, LEAST_FREE_GB = 1.0, 5.0
WANDB_HOST = "api.wandb.ai"


@dataclass(frozen=True)
class Finding:
    """One line of the table. `advice` is empty where nothing is to be done; `is_wrong`: runs fail until it is done."""

    what: str
    found: str
    advice: str = ""
    is_wrong: bool = False


def show_gigabytes(number: float) -> str:
    return f"{number / 1e9:.3g} GB"


def list_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Of each package; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def look_at_packages(folder: Path) -> list[Finding]:
    needed = list_versions(PACKAGES)
    missing = [name for name, number in needed.items() if number is None]
    listed = ", ".join(f"{name} {number}" for name, number in needed.items() if number)
    findings = [Finding("Python", sys.version.split()[0]), Finding("packages", listed)]
    if missing:
        findings[-1] = Finding("packages", listed, f"install {', '.join(missing)}", is_wrong=True)
    for name, number in list_versions(tuple(EXTRAS)).items():
        advice = "" if number else f"pip install 'depthmup[{EXTRAS[name]}]'"
        findings.append(Finding(name, number or "not installed", advice))
    return findings


def look_at_devices(folder: Path) -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    findings = [Finding("CPU", f"{cores} cores, {show_gigabytes(memory)}")]
    if importlib.util.find_spec("torch") is None:
        return findings
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            findings.append(Finding(f"GPU {number}", f"{properties.name}, {show_gigabytes(properties.total_memory)}"))
    elif shutil.which("nvidia-smi"):
        why = "a torch for CPUs" if torch.version.cuda is None else f"a torch for CUDA {torch.version.cuda}"
        advice = "install a torch for the CUDA of this machine's driver (nvidia-smi says which)"
        findings.append(Finding("GPU", f"nvidia-smi is here, but {why} sees none", advice, is_wrong=True))
    else:
        findings.append(Finding("GPU", "none here: runs take the CPU"))
    return findings


def look_at_shared_memory(folder: Path) -> list[Finding]:
    """Loader workers hand their batches over in it."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return [Finding("/dev/shm", "not there", "mount it, or set data.num_workers=0", is_wrong=True)]
    free = shutil.disk_usage(shared).free
    advice = "" if free >= LEAST_SHARED_GB * 1e9 else "make it larger (docker: --shm-size=8g), or data.num_workers=0"
    return [Finding("/dev/shm", f"{show_gigabytes(free)} free", advice)]


def look_at_folder(folder: Path) -> list[Finding]:
    """Whether studies can be kept below `folder`: it can be written to, and has locks."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    probe_file = place / f".depthmup-doctor-{os.getpid()}"
    try:
        with open(probe_file, "w") as file:
            flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locks = Finding("file locks", "work there")
    except NoLocks as error:
        locks = Finding("file locks", "missing there", str(error), is_wrong=True)
    except OSError as error:
        reason = f"cannot be written to ({error.strerror})"
        return [Finding(str(folder), reason, "give another study.directory", is_wrong=True)]
    finally:
        with suppress(OSError):  # where it could not be made
            probe_file.unlink()
    free = shutil.disk_usage(place).free
    advice = "" if free >= LEAST_FREE_GB * 1e9 else "checkpoints and shards may not fit: free some"
    return [Finding(str(folder), f"can be written to, {show_gigabytes(free)} free", advice), locks]


def look_at_slurm(folder: Path) -> list[Finding]:
    if shutil.which("sbatch") is None:
        return [Finding("Slurm", "no sbatch on PATH: runs start on this machine")]
    try:
        partitions = probe.list_partitions()
    except SlurmError as error:  # runs on this machine need none
        return [Finding("Slurm", "does not answer", f"no job can be submitted from here: {error.lines[-1]}")]
    if not partitions:
        return [Finding("Slurm", "no partition is up", "ask those who run the cluster")]
    listed = ", ".join(f"{each.name} ({each.nodes} nodes, {each.gpus} GPUs each)" for each in partitions)
    return [Finding("Slurm", listed, f"{quote_command('cluster', 'probe')} proposes a profile")]


def has_wandb_key() -> bool:
    """Whether wandb would find a key: in the environment, or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(WANDB_HOST) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def look_at_wandb(folder: Path) -> list[Finding]:
    if has_wandb_key():
        return [Finding("W&B key", "there")]
    return [Finding("W&B key", "none: track.wandb=online stays offline", "run `wandb login` to see runs in W&B")]


LOOKS: tuple[Callable[[Path], list[Finding]], ...] = (
    look_at_packages,
    look_at_devices,
    look_at_shared_memory,
    look_at_folder,
    look_at_slurm,
    look_at_wandb,
)


def examine(folder: Path, console: Console) -> bool:
    """Prints the table for studies kept below `folder`. Returns whether runs can start here."""
    findings = [finding for look in LOOKS for finding in look(folder)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for each in findings:
        mark = "[red]no[/]" if each.is_wrong else "[yellow]![/]" if each.advice else "[green]ok[/]"
        table.add_row(mark, *map(Text, (each.what, each.found, each.advice)))  # no markup: 'depthmup[wandb]'
    console.print(table)
    wrong = [each.what for each in findings if each.is_wrong]
    console.print(f"To be fixed first: {', '.join(wrong)}." if wrong else "Runs can start here.")
    return not wrong
