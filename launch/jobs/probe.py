"""`depthmup cluster probe`: a profile proposed from what sinfo says of the partitions."""

import re
from dataclasses import dataclass

import yaml

from depthmup.data.errors import UserError
from depthmup.launch.jobs import slurm

MAX_MINUTES = 24 * 60  # proposed where the partition allows more: shorter jobs start sooner, and runs are requeued


@dataclass(frozen=True)
class Partition:
    """A partition, by its most common kind of node."""

    name: str
    default: bool
    minutes: int | None  # time limit; None is unlimited
    nodes: int
    cpus: int
    memory_gb: int
    gpus: int

    def profile(self) -> dict[str, str | int]:
        """One run per GPU (or per core where there is none), with its share of the node."""
        shares = max(self.gpus, 1)
        profile: dict[str, str | int] = {"partition": self.name}
        if self.gpus:
            profile |= {"gpus_per_node": 1, "cpus_per_task": max(self.cpus // shares, 1)}
            profile["memory_gb"] = max(self.memory_gb * 9 // 10 // shares, 1)
        return profile | {"timeout_min": min(self.minutes or MAX_MINUTES, MAX_MINUTES)}


def read_minutes(text: str) -> int | None:
    """Slurm's time, '1-12:00:00' or '30:00' -> minutes; 'infinite' -> None."""
    if text == "infinite":
        return None
    days, _, rest = text.rpartition("-")
    hours, mins, _ = ([0, 0, 0] + [int(part) for part in rest.split(":")])[-3:]
    return int(days or 0) * 1440 + hours * 60 + mins


def list_partitions() -> list[Partition]:
    """Every partition that is up. Raises SlurmError."""
    lines = slurm.call_slurm("sinfo", "--noheader", "--format=%P|%a|%l|%D|%c|%m|%G").splitlines()
    found: dict[str, Partition] = {}
    for line in lines:
        name, up, limit, nodes, cpus, memory, gres = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", gres))
        size = int(cpus.rstrip("+")), int(memory.rstrip("+")) // 1000
        one = Partition(name.rstrip("*"), name.endswith("*"), read_minutes(limit), int(nodes), *size, gpus)
        if up == "up" and (one.name not in found or found[one.name].nodes < one.nodes):
            found[one.name] = one
    return list(found.values())


def propose_profile() -> str:
    """A profile as YAML: the default partition, or the one with the most GPUs; the others as comments. Raises UserError
    where Slurm does not answer, or shows none."""
    try:
        found = list_partitions()
    except slurm.SlurmError as error:
        raise UserError(f"Slurm does not answer: {error}") from None
    if not found:
        raise UserError("sinfo shows no partition that is up: try again once one is")
    best = max(found, key=lambda p: (p.gpus > 0, p.default, p.gpus * p.nodes))
    lines = [
        "# Save as cluster/NAME.yaml where you work, or ~/.config/depthmup/cluster/NAME.yaml",
        "# for all your work, and launch with --cluster NAME. Proposed from sinfo:",
    ]
    for p in found:
        limit = "no limit" if p.minutes is None else f"{p.minutes} min"
        lines.append(
            f"# {p.name}: {p.nodes} nodes of {p.cpus} CPUs, {p.memory_gb} GB, {p.gpus} GPUs; {limit}"
            + (" (default)" if p.default else "")
        )
    return "\n".join(lines) + "\n" + yaml.safe_dump(best.profile(), sort_keys=False)
