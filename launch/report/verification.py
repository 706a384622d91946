"""What a verification found: how many perturbed runs are better than the transferred values, and where those lie."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy import stats

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.index import show_count
from depthmup.launch.findings.share import SURE, Share
from depthmup.launch.report.hyperparameters import show_value
from depthmup.launch.report.place import open_results
from depthmup.launch.report.record import convert_number, dump, make_task_record
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.pool import refuse_mixture
from depthmup.launch.runs.space import find_value
from depthmup.launch.runs.verification import Verification
from depthmup.launch.values import Range
from depthmup.launch.wording import show_number, show_share, show_shares, wrap_line

BEST_SHARE = 0.25  # of the perturbed runs: where their values lie shows where the optimum does


@dataclass(frozen=True)
class Shift:
    """Where the best quarter of the perturbed runs lie on one hyperparameter, from the transferred value: the mean, and
    an interval that holds for all hyperparameters at once with 95 %. Octaves on a logarithmic scale, else in the
    range's width; None for a choice."""

    key: str
    own: Any
    mean: float | None
    half_width: float | None
    middle: float | None  # of the range, where the best lie on average if the value does not matter

    @property
    def moved(self) -> bool:
        """Whether they lie neither about the transferred value nor about the range's middle, nor between the two."""
        if self.mean is None or self.half_width is None or self.middle is None:
            return False
        above = self.mean - self.half_width > max(self.middle, 0)
        return above or self.mean + self.half_width < min(self.middle, 0)


@dataclass(frozen=True)
class Verified:
    """A verification whose runs are done. Losses of runs that diverged are infinite."""

    verification: Verification
    own: list[float]  # of the transferred values, by seed
    losses: list[float]  # of the perturbed runs, in their order
    shifts: list[Shift]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.own)

    @property
    def noise(self) -> float:
        """Standard deviation between seeds, as a share of the loss; infinite for one seed."""
        if len(self.own) < 2 or not math.isfinite(self.mean):
            return math.inf
        return statistics.stdev(self.own) / self.mean

    @property
    def margin(self) -> float:
        """Share of the loss that a value may cost and still transfer."""
        return self.verification.file.study.regret_limit

    def count_better_by(self, margin: float) -> Share:
        limit = self.mean * (1 - margin) if math.isfinite(self.mean) else math.inf
        return Share(sum(loss < limit for loss in self.losses), len(self.losses))


def list_losses(runs: list[PlannedRun], metric: str) -> list[float]:
    """Of those that are done."""
    return [loss for run in runs if (loss := run.loss(metric)) is not None]


def collect_verification(verification: Verification) -> Verified:
    """Reads what has finished. Raises UserError before all runs are done, as a bound from those that end first is none,
    and where they come from different code or images."""
    refuse_mixture(verification)
    metric = verification.file.study.metric
    own = list_losses(verification.transferred, metric)
    perturbed = [run for _, run in verification.perturbed]
    losses = list_losses(perturbed, metric)
    if missing := len(verification.transferred) + len(perturbed) - len(own) - len(losses):
        raise UserError(
            f"the verification {verification.path} has not ended ({missing} of {len(own) + len(losses) + missing} runs "
            f"are not done): {verification.command('verify')}"
        )
    values = [values for values, _ in verification.perturbed]
    order = sorted(range(len(losses)), key=losses.__getitem__)
    best = [values[i] for i in order[: max(round(BEST_SHARE * len(losses)), 3)] if math.isfinite(losses[i])]
    return Verified(verification, own, losses, [measure_shift(verification, key, best) for key in verification.space])


def measure_shift(verification: Verification, key: str, best: list[dict[str, Any]]) -> Shift:
    own = verification.read_own_value(key)
    offsets = [offset for values in best if (offset := verification.offset(key, values[key])) is not None]
    if len(offsets) < 3:
        return Shift(key, own, None, None, None)
    level = 1 - (1 - SURE) / 2 / len(verification.space)  # Bonferroni: for all of them at once
    quantile = float(stats.t.ppf(level, len(offsets) - 1))
    half_width = quantile * statistics.stdev(offsets) / math.sqrt(len(offsets))
    middle = verification.offset(key, find_value(verification.space[key], 0.5))
    return Shift(key, own, statistics.fmean(offsets), half_width, middle)


def describe_verification(found: Verified) -> list[str]:
    """What the numbers mean, in words."""
    settings, metric = found.verification.settings, found.verification.file.study.metric
    count, at = len(found.losses), found.verification.size
    share, any_better = found.count_better_by(found.margin), found.count_better_by(0.0)
    verdict, top = share.judge(settings.top), show_share(settings.top)
    said = [
        f"{verdict.capitalize()} {top}" + {
            "among the best": f": with {SURE:.0%} confidence, at most {show_share(share.high)} of the space is better "
            f"by more than {show_share(found.margin)} of the loss.",
            "not among the best": f": with {SURE:.0%} confidence, at least {show_share(share.low)} of the space is "
            f"better by more than {show_share(found.margin)} of the loss.",
            "undecided": f": between {show_share(share.low)} and {show_share(share.high)} of the space are better by "
            f"more than {show_share(found.margin)} of the loss (each bound holds with {SURE:.0%}); more verify.runs "
            "would narrow that.",
        }[verdict],
        f"{share.better} of {count} perturbed runs at {at} are better by more than that, {any_better.better} are "
        f"better at all: {metric} {show_number(found.mean)} with the transferred values (mean of "
        f"{show_count(len(found.own), 'seed')}), {show_number(min(found.losses))} is the lowest of the others.",
    ]  # fmt: skip
    if len(found.own) > 1 and found.noise > found.margin:
        said.append(
            f"Seeds differ by {show_share(found.noise)} of the loss (standard deviation), more than the "
            f"{show_share(found.margin)} that count as better (study.regret_limit): some of the {share.better} may be "
            "luck."
        )
    moved = [each for each in found.shifts if each.moved]
    for each in moved:
        assert each.mean is not None
        said.append(f"{each.key}: the best quarter lies {'above' if each.mean > 0 else 'below'} the transferred value.")
    if not moved:
        said.append("On no hyperparameter does the best quarter lie to one side of the transferred value.")
    return said


def show_shift(found: Verified, each: Shift) -> str:
    if each.mean is None or each.half_width is None:
        return ""
    dimension = found.verification.space[each.key]
    unit = "octaves" if isinstance(dimension, Range) and dimension.scale == "log" else "of the range"
    return f"{each.mean:+.2f} +- {each.half_width:.2f} {unit}"


def print_verification(found: Verified, console: Console) -> None:
    """80 columns: each hyperparameter, its range and where the best runs lie; then what follows."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("hyperparameter", "transferred", "perturbed", "best quarter", ""):
        table.add_column(heading, no_wrap=heading == "hyperparameter")
    for each in found.shifts:
        table.add_row(
            each.key,
            show_value(each.own),
            show_dimension(found.verification, each.key),
            show_shift(found, each),
            "moved" if each.moved else "",
        )
    console.print(table)
    for sentence in describe_verification(found):
        console.print(wrap_line(sentence), highlight=False, markup=False)


def show_verification(verification: Verification, console: Console, out: Path | None) -> None:
    """Prints what a verification found, and writes it into its folder, or that of its name in `out`. Raises UserError
    before its end."""
    found = collect_verification(verification)
    print_verification(found, console)
    with open_results(verification, out) as root:
        console.print(f"Written: {write_verification(found, root)}", highlight=False)


def show_dimension(verification: Verification, key: str) -> str:
    dimension = verification.space[key]
    if isinstance(dimension, Range):
        return f"{show_value(float(dimension.first))} to {show_value(float(dimension.last))}"
    return ", ".join(map(str, dimension))


def write_verification(found: Verified, root: Path) -> Path:
    """Writes verify.json into the verification's folder; returns its path."""
    settings, share = found.verification.settings, found.count_better_by(found.margin)
    record = {
        **make_task_record(found.verification),
        **found.verification.size.axes,
        "cost": found.verification.cost,  # in runs of the file
        "top": settings.top,
        "margin": found.margin,
        "better": share.better,
        "better_at_all": found.count_better_by(0.0).better,
        "runs": share.runs,
        "share": [share.low, share.high],  # each bound with SURE
        "verdict": share.judge(settings.top),
        "transferred": [convert_number(loss) for loss in found.own],
        "hyperparameters": [{**vars(each), "moved": each.moved} for each in found.shifts],
        "perturbed": [
            {"values": values, "loss": convert_number(loss)}
            for (values, _), loss in zip(found.verification.perturbed, found.losses, strict=True)
        ],
    }
    path = root / "verify.json"
    write_atomically(path, dump(record).encode())
    return path


def list_verification_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A row per record of a verification."""
    return [
        {
            "verification": record["study"],
            "at": f"{record['model']} {record['width']} x {record['depth']}",
            "transferred": f"{statistics.fmean(losses):.4g} ({len(losses)} seeds)",
            "better": f"{record['better']} of {record['runs']} by {show_share(record['margin'])}",
            "share of the space": show_shares((record["share"][0], record["share"][1])),
            "moved": ", ".join(h["key"] for h in record["hyperparameters"] if h["moved"]),
            "verdict": f"{record['verdict']}{' of' * (record['verdict'] == 'undecided')} {100 * record['top']:g} %",
        }
        for record in records
        for losses in [[math.inf if loss is None else loss for loss in record["transferred"]]]
    ]
