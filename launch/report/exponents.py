"""`depthmup exponents`: how the weights of a study's residual branches change with depth, at the start and trained."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.launch.findings.analysis import Comparison
from depthmup.launch.findings.convergence import select_along_axis
from depthmup.launch.findings.exponents import MEASURES, MIN_DEPTHS, Slope, fit_slope, measure_weights, name_regime
from depthmup.launch.report import plots
from depthmup.launch.report.collect import collect
from depthmup.launch.report.converge import find_runs_along
from depthmup.launch.report.page import EXPONENTS_FILES
from depthmup.launch.report.place import open_results
from depthmup.launch.report.record import dump
from depthmup.launch.report.tables import format_growth, print_sentence, print_table
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.study import Study
from depthmup.models.build import ScaledModel, build, find_slots
from depthmup.models.parameterization import Role

SUBJECTS = ("start", "trained", "change")  # the weights at the start, after training, and their difference


# ---------------------------------------------------------------- a run's weights


def map_branch_factors(scaled: ScaledModel) -> dict[str, float]:
    """Module -> the multiplier of the branch that it is the last one of."""
    slots = find_slots(scaled.network, scaled.roles.branches)
    return {
        slot.last_before(name): scaled.multipliers[name].value
        for name, slot in slots.items()
        if name in scaled.multipliers
    }


def group_block_tensors(scaled: ScaledModel) -> dict[str, list[list[str]]]:
    """Name of a tensor within its block -> stages -> names of that parameter in the blocks that follow each other.

    A stage ends where the weight's shape changes. Raises UserError for a network whose blocks are not known.
    """
    if not scaled.blocks:
        raise UserError(f"{type(scaled.network).__name__} does not say which modules are its blocks: Roles.blocks")
    shapes = {name: parameter.shape for name, parameter in scaled.network.named_parameters()}
    found: dict[str, list[tuple[object, str]]] = {}
    for block in scaled.blocks:
        for name, rule in scaled.rules.items():
            if rule.role is Role.BRANCH_HIDDEN and name.startswith(f"{block}."):
                stage = block.rpartition(".")[0], shapes[name]
                found.setdefault(name.removeprefix(f"{block}."), []).append((stage, name))
    return {
        tensor: [[name for _, name in of] for _, of in groupby(names, key=lambda each: each[0])]
        for tensor, names in found.items()
    }


def run_measures(run: PlannedRun) -> dict[tuple[str, str], dict[str, float]]:
    """(tensor, subject) -> measure -> value, of one finished run. Raises UserError where there are no weights."""
    weights = run.directory.weights
    if not weights.exists():
        raise UserError(f"{run.directory.path}: no {weights.name} there: delete the folder to train it again")
    scaled = build(run.config.model, run.config.parameterization, run.config.seed)
    factors = map_branch_factors(scaled)
    start: Mapping[str, Tensor] = dict(scaled.network.named_parameters())
    trained: Mapping[str, Tensor] = load_file(weights)

    def rows(names: list[str], of: Mapping[str, Tensor]) -> np.ndarray:
        """(blocks, entries), float64."""
        factor = [factors.get(name.rpartition(".")[0], 1.0) for name in names]
        return np.array([f * of[name].detach().double().numpy().ravel() for f, name in zip(factor, names, strict=True)])

    found = {}
    for tensor, stages in group_block_tensors(scaled).items():
        before, after = ([rows(names, of) for names in stages] for of in (start, trained))
        change = [b - a for a, b in zip(before, after, strict=True)]
        for subject, weights_of in zip(SUBJECTS, (before, after, change), strict=True):
            found[tensor, subject] = measure_weights(weights_of)
    return found


# ---------------------------------------------------------------- the study's runs


@dataclass(frozen=True)
class Growth:
    """One tensor of one parameterization's blocks, over depth."""

    parameterization: str
    tensor: str
    subject: str
    values: dict[str, dict[int, list[float]]]  # measure -> depth -> of every seed
    left_out: str

    @property
    def slopes(self) -> dict[str, Slope | None]:
        return {measure: fit_slope(of) for measure, of in self.values.items()}

    @property
    def record(self) -> dict[str, Any]:
        slopes = {measure: None if slope is None else vars(slope) for measure, slope in self.slopes.items()}
        return {**vars(self), "slopes": slopes, "regime": name_regime(self.slopes)}


def collect_growths(study: Study, own: bool) -> Iterator[Growth]:
    """Every parameterization's, over the depths at the base's width. own: at each size's own best value that ran,
    instead of the base's."""
    analysis, base = collect(study).analysis, study.file.study.sizes[0]
    for name in (judgement.parameterization for judgement in analysis.judgements):
        shown = select_along_axis([c for c in analysis.comparisons if c.curve.parameterization == name], base, "depth")
        best = {c.curve.size: float(c.curve.values[np.argmin(c.curve.mean)]) for c in shown if len(c.curve.values)}
        at_base = next((best[c.curve.size] for c in shown if c.curve.size == base), math.nan)

        def value(comparison: Comparison, best: dict[Any, float] = best, at_base: float = at_base) -> float:
            return best[comparison.curve.size] if own else at_base

        runs, left_out = find_runs_along(study, name, "depth", shown, value)
        measured = {depth: [run_measures(run) for run in by_seed.values()] for depth, by_seed in runs.items()}
        keys = dict.fromkeys(key for of in measured.values() for each in of for key in each)
        for tensor, subject in keys:
            values = {
                measure: {
                    depth: [found for each in of if math.isfinite(found := each[tensor, subject][measure])]
                    for depth, of in measured.items()
                }
                for measure in MEASURES
            }
            yield Growth(name, tensor, subject, values, ", ".join(left_out))


def draw_exponents(found: list[Growth]) -> Figure:
    """A row for each of SUBJECTS, a column for each of MEASURES; fits solid, with their exponents."""
    figure, axes = plt.subplots(
        len(SUBJECTS), len(MEASURES), figsize=(4 * len(MEASURES), 3.4 * len(SUBJECTS)), layout="constrained"
    )
    lines = list(dict.fromkeys((each.parameterization, each.tensor) for each in found))
    for each in found:
        row, colour = axes[SUBJECTS.index(each.subject)], f"C{lines.index((each.parameterization, each.tensor))}"
        for axis, measure in zip(row, MEASURES, strict=True):
            values, slope = each.values[measure], each.slopes[measure]
            x = np.array([depth for depth, of in values.items() for _ in of], dtype=float)
            y = np.array([value for of in values.values() for value in of])
            label = f"{each.parameterization}, {each.tensor}" + ("" if slope is None else f": {slope.exponent:.2f}")
            axis.plot(x, y, ".", color=colour, label=label)
            if slope is not None:
                fit = np.exp(np.log(y).mean() + slope.exponent * (np.log(x) - np.log(x).mean()))
                axis.plot(x, fit, color=colour, linewidth=1)
            axis.set_title(f"{each.subject}: {measure}", fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.legend(fontsize=6)
    for axis in axes[-1]:
        axis.set_xlabel("depth")
    return figure


def show_exponents(study: Study, own: bool, out: Path | None, console: Console) -> list[Path]:
    """Prints the exponents and regimes, writes EXPONENTS_FILES into the study's folder, or that of its name in `out`,
    and returns their paths.

    Raises UserError where no parameterization has MIN_DEPTHS depths that train.
    """
    found = list(collect_growths(study, own))
    if not any(slope for each in found for slope in each.slopes.values()):
        left_out = "; ".join(
            dict.fromkeys(f"{each.parameterization}: {each.left_out}" for each in found if each.left_out)
        )
        raise UserError(
            f"{study.path}: exponents need {MIN_DEPTHS} finished depths at the base's width that train"
            f"{left_out and f' (left out: {left_out})'}: add to study.sizes, or finish it with "
            f"{study.command('transfer')}"
        )
    print_sentence(console, "Exponents of depth, of weights with the branch multiplier in them:")
    growths = [each.record for each in found]
    record = {"study": study.file.study.name, "own_values": own, "growths": growths}
    rows = [format_growth(growth) for growth in growths]
    for measure in MEASURES:
        print_sentence(console, f"\n{measure}")
        kept = [{key: row[key] for key in ("rules", "tensor", "of")} | {"exponent": row[measure]} for row in rows]
        print_table(kept, ("rules", "tensor", "of"), console)
    print_sentence(console, "")
    for row in rows:
        print_sentence(console, f"{row['rules']}, {row['tensor']}, {row['of']}: {row['regime']}")
    for sentence in dict.fromkeys(
        f"{each.parameterization}: left out: {each.left_out}" for each in found if each.left_out
    ):
        print_sentence(console, sentence)
    with open_results(study, out, "exponents") as root:
        paths = [root / name for name in EXPONENTS_FILES]
        write_atomically(paths[0], dump(record).encode())
        plots.save_figure(draw_exponents(found), paths[1])
    return paths
