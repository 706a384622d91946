"""What a search found: winners re-run with new seeds, what each hyperparameter did, and the tuned proxy's file."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from scipy import stats

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.index import show_count
from depthmup.launch.findings.intervals import CONFIDENCE
from depthmup.launch.findings.surrogate import LEAST_MEASURED
from depthmup.launch.paths import quote_command
from depthmup.launch.report.hyperparameters import (
    Hyperparameter,
    describe_edge,
    describe_hyperparameters,
    shorten_key,
    show_likely,
    show_value,
)
from depthmup.launch.report.place import open_results
from depthmup.launch.report.record import convert_number, dump, make_task_record
from depthmup.launch.runs.search import Search
from depthmup.launch.values import Range
from depthmup.launch.wording import join_with_and, show_number, show_quantity, wrap_line
from depthmup.train.reading import to_yaml

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Winner:
    """One of the search's best, re-run: the loss that chose it flatters it, the losses of the new seeds do not."""

    trial: int
    values: dict[str, Any]
    searched: float  # the loss that made it a winner
    losses: list[float]  # with new seeds

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def half_width(self) -> float:
        """Of the interval of the mean over the new seeds, by Student's t; infinite for one seed."""
        count = len(self.losses)
        if count < 2:
            return math.inf
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(self.losses) / math.sqrt(count)


@dataclass(frozen=True)
class Found:
    """A finished search."""

    search: Search
    trials: list[tuple[int, dict[str, Any], float]]  # (number, values, loss) of each finished suggestion
    failed: int  # suggestions whose values do not go together
    pruned: int  # suggestions that were ended early
    no_importance: str  # why nothing is said of it; '' where it is
    winners: list[Winner]  # the best first, by the new seeds
    dimensions: list[Hyperparameter]

    @property
    def baseline(self) -> float | None:
        """The loss at the file's own values, where the search began with them."""
        values = self.search.own_values()
        return next((loss for number, tried, loss in self.trials if number == 0 and tried == values), None)


def collect_search(search: Search) -> Found:
    """Reads what has finished. Raises UserError before the winners' runs are done, and where nothing learned."""
    trials, failed, pruned = [], 0, 0
    for trial in search.trials():
        runs = search.plan_trial_runs(trial)
        loss = search.loss(runs)
        failed += not runs
        pruned += any(run.is_pruned() for run in runs)
        if loss is not None:
            trials.append((trial.number, trial.params, loss))
    losses, winners = {number: loss for number, _, loss in trials}, []
    for number in search.winners():
        runs = search.plan_reruns(number)
        again = [loss for run in runs if (loss := search.loss([run])) is not None]
        if len(again) < len(runs):
            break
        winners.append(Winner(number, search.trials()[number].params, losses[number], again))
    if not winners or len(winners) < len(search.winners()):
        if not search.affordable(len(search.trials())) and not search.pending():
            search.rank_learned()
        raise UserError(
            f"the search {search.path} has not ended ({len(trials) + pruned} of {search.expected} suggestions "
            f"are trained): {search.command('tune')}"
        )
    winners.sort(key=lambda winner: winner.mean)
    dimensions, no_importance = describe_hyperparameters(search, winners[0].values)
    return Found(search, trials, failed, pruned, no_importance, winners, dimensions)


def print_search(found: Found, console: Console) -> None:
    """80 columns: the winners, the hyperparameters, and what follows."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    keys = [shorten_key(key).replace("_", " ") for key in found.search.settings.space]  # two lines where a name is long
    for heading in ("trial", "search", "new seeds", "+-", *keys):
        table.add_column(heading, justify="right")
    for winner in found.winners:
        numbers = (winner.searched, winner.mean, winner.half_width)
        values = [show_value(winner.values[key]) for key in found.search.settings.space]
        table.add_row(str(winner.trial), *map(show_number, numbers), *values)
    console.print(table)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("hyperparameter", "best", "surrogate", f"{CONFIDENCE:.0%} interval", "importance"):
        table.add_column(heading, no_wrap=heading == "hyperparameter")
    for each in found.dimensions:
        optimum = "" if each.optimum is None else show_value(each.optimum)
        share = "" if each.importance is None else f"{each.importance:.0%}"
        table.add_row(each.key, show_value(each.best), optimum, show_likely(each), share)
    console.print()
    console.print(table)
    for sentence in describe_search(found):
        console.print(wrap_line(sentence), highlight=False, markup=False)


def describe_search(found: Found) -> list[str]:
    """What the numbers mean, in words."""
    best, metric = found.winners[0], found.search.file.study.metric
    said = [
        f"Best: trial {best.trial} with {metric} {show_number(best.mean)} over {len(best.losses)} new seeds. The "
        f"search itself saw {show_number(best.searched)}: the lowest of many noisy losses flatters."
    ]
    if (baseline := found.baseline) is not None:
        seeds = show_count(len(found.search.settings.seeds), "seed")
        said.append(f"The file's own values had {show_number(baseline)} ({seeds}).")
    noise = best.half_width
    if close := [other.trial for other in found.winners[1:] if other.mean - best.mean < noise + other.half_width]:
        trials = "trial" if len(close) == 1 else "trials"
        said.append(f"Within noise of it: {trials} {join_with_and([str(trial) for trial in close])}.")
    if unknown := [each.key for each in found.dimensions if not each.identified]:
        why = f"the surrogate's optimum may lie all over {'its range' if len(unknown) == 1 else 'their ranges'}"
        if found.dimensions[0].optimum is None:
            why = f"a surrogate needs {LEAST_MEASURED} runs to their end that are better than a guess"
        said.append(f"Not identified: {', '.join(unknown)}; {why}.")
    space = found.search.settings.space
    if edges := "; ".join(edge for each in found.dimensions if (edge := describe_edge(space[each.key], each))):
        said.append(f"{edges[0].upper()}{edges[1:]}: widen tune.space there, under another study.name.")
    if pair := describe_pair(found):
        said.append(pair)
    if found.no_importance:
        said.append(f"No importance: {found.no_importance}")
    if found.pruned:
        said.append(f"Ended early by tune.prune: {show_count(found.pruned, 'suggestion')}, not counted above.")
    if found.failed:
        said.append(f"Refused, as values do not go together: {show_count(found.failed, 'suggestion')}.")
    return said


def describe_pair(found: Found) -> str:
    """Whether the learning rate and the decay of weights, where both are searched, have an optimum inside of the space;
    '' where they are not."""
    by_key = {each.key: each for each in found.dimensions}
    decay = next((by_key[key] for key in ("optimizer.tau_ema", "optimizer.weight_decay") if key in by_key), None)
    if decay is None or "optimizer.lr" not in by_key:
        return ""
    missing = []
    for each in (by_key["optimizer.lr"], decay):
        if edge := describe_edge(found.search.settings.space[each.key], each):
            missing.append(edge)
        elif not each.identified:
            missing.append(f"{shorten_key(each.key)} is not identified")
    names = f"lr and {shorten_key(decay.key)}"
    if missing:
        return f"No interior optimum of the pair {names}: {join_with_and(missing)}."
    return f"The pair {names} has an interior optimum: both are inside of their ranges, and identified."


def search_record(found: Found) -> dict[str, Any]:
    """What search.json holds."""
    search = found.search
    return {
        **make_task_record(search),
        **search.examples[0].size.axes,
        "flops": sum(run.share_trained() for run in search.runs) * search.flops,
        "sampler": search.settings.sampler,
        "seeds": list(search.settings.seeds),
        "baseline": convert_number(found.baseline),
        "pruned": found.pruned,
        "winners": [
            {"trial": w.trial, "values": w.values, "search": w.searched, "mean": w.mean,
             "half_width": convert_number(w.half_width), "losses": w.losses}
            for w in found.winners
        ],
        "hyperparameters": [vars(each) for each in found.dimensions],
        "trials": [{"trial": number, "values": values, "loss": loss} for number, values, loss in found.trials],
    }  # fmt: skip


def search_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A row per record of a search: its best winner."""
    return [
        {
            "search": record["study"],
            "at": f"{record['model']} {record['width']} x {record['depth']}",
            "suggestions": f"{len(record['trials']) + record['pruned']} ({record['sampler']})",
            "FLOPs": show_quantity(record["flops"]),
            "file's own": f"{record['baseline']:.4g}" if record["baseline"] else "",
            "best, search": f"{best['search']:.4g}",
            "new seeds": f"{best['mean']:.4g} +- {best['half_width']:.2g} ({len(best['losses'])})",
            "best values": ", ".join(f"{key} {show_value(value)}" for key, value in best["values"].items()),
            "not identified": ", ".join(h["key"] for h in record["hyperparameters"] if not h["identified"]),
        }
        for record in records
        for best in record["winners"][:1]
    ]


def draw_slices(found: Found) -> "Figure":
    """Loss against each hyperparameter, one dot a suggestion; the winners are ringed, and where the surrogate's optimum
    may lie is shaded."""
    from depthmup.launch.report import plots

    space = found.search.settings.space
    figure, axes = plots.make_row(len(space))
    rings = {winner.trial for winner in found.winners}
    for axis, (key, dimension), each in zip(axes, space.items(), found.dimensions, strict=True):
        if each.low is not None and each.high is not None:
            axis.axvspan(each.low, each.high, color="tab:green", alpha=0.15, linewidth=0)
        names = None if isinstance(dimension, Range) else [str(value) for value in dimension]
        values = [tried[key] for _, tried, _ in found.trials]
        places = values if names is None else [names.index(str(list_again(value))) for value in values]
        losses = [loss for _, _, loss in found.trials]
        axis.scatter(places, losses, s=14, c=range(len(losses)), cmap="viridis")
        ringed = [(x, loss) for x, (number, _, loss) in zip(places, found.trials, strict=True) if number in rings]
        across, up = zip(*ringed, strict=True)
        axis.scatter(across, up, s=70, facecolors="none", edgecolors="crimson")
        if names:
            axis.set_xticks(range(len(names)), names)
        elif isinstance(dimension, Range) and dimension.scale == "log":
            axis.set_xscale("log", base=2)
        axis.set_xlabel(key)
        axis.grid(alpha=0.25)
    axes[0].set_yscale("log")
    axes[0].set_ylabel(found.search.file.study.metric)
    plots.mark_log_axis(axes[0])
    return figure


def list_again(value: Any) -> Any:
    """A choice as the file has it: Optuna's tuple was a list."""
    return [list_again(each) for each in value] if isinstance(value, tuple) else value


def show_search(search: Search, console: Console, out: Path | None) -> Found:
    """Prints what a search found, and writes it and the tuned proxy's file into its folder, or that of its name in
    `out`. Raises UserError before its end."""
    found = collect_search(search)
    print_search(found, console)
    with open_results(search, out) as root:
        best = write_search(found, root)
    console.print(f"Written: {best} (also search.json, search.png)", highlight=False)
    return found


def write_search(found: Found, root: Path) -> Path:
    """Writes search.json, search.png and best.yaml into the folder `root`; returns the last. Its values are those of
    the best winner by its new seeds."""
    from depthmup.launch.report import plots

    plots.save_figure(draw_slices(found), root / "search.png")
    write_atomically(root / "search.json", dump(search_record(found)).encode())
    config = found.search.runs_of(found.winners[0].values, (found.search.file.seed,))[0].config
    best = root / "best.yaml"
    head = (
        f"# The tuned proxy of the search {found.search.file.study.name}: trial {found.winners[0].trial}, "
        f"{found.search.file.study.metric} {show_number(found.winners[0].mean)} over new seeds.\n"
        f"# One run as it stands ({quote_command('launch', best)}); with a section study: of sizes it is a "
        "transfer study.\n"
    )
    write_atomically(best, (head + to_yaml(config)).encode())
    return best
