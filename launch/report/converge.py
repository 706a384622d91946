"""`depthmup converge`: a study's loss curves and feature kernels at the base's optimum, over width and over depth.

What is compared: runs at one value of the hyperparameter, the grid's nearest to the base's optimum, whose sizes differ
in one axis only. The kernel of a run is F F^T / N, F (images, N) being what its readout gets for the first images of
the evaluation split, before any multiplier; N is its number of features.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.launch.findings.analysis import Comparison
from depthmup.launch.findings.convergence import MIN_SIZES, Line, Rate, select_along_axis
from depthmup.launch.findings.verdict import Analysis
from depthmup.launch.report import plots
from depthmup.launch.report.collect import collect
from depthmup.launch.report.page import CONVERGENCE_FILES
from depthmup.launch.report.place import open_results
from depthmup.launch.report.record import dump, make_rate_record
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.study import Study
from depthmup.models.build import build_meta
from depthmup.train.config import RunConfig
from depthmup.train.evaluate import read_held_out
from depthmup.train.rundir import RunDirectory, parse_lines

IMAGES = 128
QUANTITIES = ("loss curve", "feature kernel")
NO_LIMIT = (
    "The limit of these networks is not known, so the largest size stands for it.\n"
    "`depthmup limit` knows that of a residual MLP."
)


# ---------------------------------------------------------------- what a run gives


def read_losses(directory: RunDirectory) -> tuple[np.ndarray, np.ndarray]:
    """(steps, training losses) of the metrics file's lines."""
    lines = parse_lines(directory.metrics, "step", "loss")
    return np.array([line["step"] for line in lines]), np.array([line["loss"] for line in lines])


def probe_images(config: RunConfig) -> Tensor:
    """The first IMAGES that are held out. (images, channels, size, size)"""
    return read_held_out(config, IMAGES, config.model.image_size)[0]


def compute_kernel(run: PlannedRun, images: Tensor) -> np.ndarray:
    """The final weights' kernel between `images`: (images, images). Raises UserError where there are no weights."""
    directory = run.directory
    if not directory.weights.exists():
        raise UserError(f"{directory.path}: no {directory.weights.name} there: delete the folder to train it again")
    scaled = build_meta(run.config.model, run.config.parameterization)
    network = scaled.network
    network.load_state_dict(load_file(directory.weights), strict=True, assign=True)
    features: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features.append(inputs[0])

    network.get_submodule(scaled.roles.readout).register_forward_pre_hook(keep, prepend=True)
    with torch.inference_mode():
        network.eval()(images)
    (rows,) = features
    return (rows @ rows.T / rows.shape[1]).double().numpy()


# ---------------------------------------------------------------- the study's runs


def collect_lines(study: Study, analysis: Analysis) -> Iterator[Line]:
    """Every parameterization along every axis of which it has sizes enough. Raises UserError for lost files."""
    base, images = study.file.study.sizes[0], None
    for judgement in analysis.judgements:
        name = judgement.parameterization
        own = [c for c in analysis.comparisons if c.curve.parameterization == name]
        optimum = next(c.curve for c in own if c.curve.size == base)
        if optimum.optimum.x is None:
            continue
        value = float(optimum.values[optimum.at(optimum.optimum.x)])
        for axis in ("width", "depth"):
            shown = select_along_axis(own, base, axis)
            if len(shown) < MIN_SIZES:
                continue
            images = probe_images(study.runs[0].config) if images is None else images
            yield collect_line(study, name, axis, value, shown, images)


def find_runs_along(
    study: Study, parameterization: str, axis: str, shown: list[Comparison], value_of: Callable[[Comparison], float]
) -> tuple[dict[int, dict[int, PlannedRun]], list[str]]:
    """(size along the axis -> seed -> run, what is left out and why): the runs of `shown` at the value that `value_of`
    gives of each, but for sizes at which they diverge or learn nothing: no limit of anything."""
    runs: dict[int, dict[int, PlannedRun]] = {}
    left_out = []
    for comparison in shown:
        curve, value = comparison.curve, value_of(comparison)
        at_value = {
            point.seed: (point, done["outcome"])
            for point in study.points
            if (point.parameterization, point.size, point.value) == (parameterization, curve.size, value)
            and (done := point.done())
        }
        number = getattr(curve.size, axis)
        if not at_value:
            left_out.append(f"{axis} {number} (no run at this value)")
        elif any(outcome == "diverged" for _, outcome in at_value.values()):
            left_out.append(f"{axis} {number} (diverged)")
        elif not np.isfinite(curve.mean[curve.values == value]).all() or not curve.learns:
            left_out.append(f"{axis} {number} (learns nothing)")
        else:
            runs[number] = {seed: point for seed, (point, _) in at_value.items()}
    return runs, left_out


def collect_line(
    study: Study, parameterization: str, axis: str, value: float, shown: list[Comparison], images: Tensor
) -> Line:
    """The runs of `shown` at `value`."""
    runs, left_out = find_runs_along(study, parameterization, axis, shown, lambda comparison: value)
    seeds = tuple(sorted(set.intersection(*map(set, runs.values())))) if runs else ()
    curves: dict[int, np.ndarray] = {}
    kernels: dict[int, np.ndarray] = {}
    steps = np.array([])
    for number, by_seed in runs.items():
        of_seeds = [read_losses(by_seed[seed].directory) for seed in seeds]
        steps = of_seeds[0][0] if of_seeds else steps
        curves[number] = np.array([losses for _, losses in of_seeds])
        kernels[number] = np.array([compute_kernel(by_seed[seed], images).ravel() for seed in seeds])
    values = dict(zip(QUANTITIES, (curves, kernels), strict=True))
    return Line(parameterization, axis, value, seeds, steps, values, ", ".join(left_out))


# ---------------------------------------------------------------- what is shown


def make_record(found: Line, quantity: str, rate: Rate) -> dict[str, Any]:
    return {
        "parameterization": found.parameterization,
        "quantity": quantity,
        "axis": found.axis,
        "value": found.value,
        "seeds": list(found.seeds),
        "largest": rate.largest,
        **make_rate_record(rate),
        "left_out": found.left_out,
    }


def describe_rate(found: Line, quantity: str, rate: Rate) -> list[str]:
    """What a terminal shows of one rate."""
    seeds = f"{rate.law.measure}, {len(found.seeds)} seeds"
    exponent = "no exponent" if rate.exponent is None else f"exponent {rate.exponent:.2f}"
    known = f" ({rate.interval[0]:.2f} to {rate.interval[1]:.2f})" if rate.interval else ""
    said = [
        f"{found.parameterization}, {quantity} over {found.axis} ({seeds}):",
        f"  {exponent}{known}, theory {rate.law.exponent:g}",
    ]
    pairs = zip(rate.sizes, rate.distance, strict=True)
    if len(rate.sizes):
        distances = ", ".join(f"{'noise' if np.isnan(d) else f'{d:.2g}'} at {size:g}" for size, d in pairs)
        said.append(f"  distance to {found.axis} {rate.largest:g}, which stands for the limit: {distances}")
    notes = [rate.remark, f"left out: {found.left_out}" if found.left_out else ""]
    return [*said, *(f"  {note}" for note in notes if note)]


def converge(study: Study, out: Path | None, console: Console) -> list[Path]:
    """Prints the rates, writes convergence.json and the figures into the study's folder, or that of its name in `out`,
    and returns these paths.

    Raises UserError where no parameterization has an optimum and MIN_SIZES sizes along an axis.
    """
    found = list(collect_lines(study, collect(study).analysis))
    if not found:
        raise UserError(
            f"{study.path}: convergence needs a parameterization with an optimum at the base and {MIN_SIZES} finished "
            f"sizes along width or depth: add to study.sizes, or finish it with {study.command('transfer')}"
        )
    all_rates = [(each, quantity, rate) for each in found for quantity in QUANTITIES for rate in each.rates(quantity)]
    for each in all_rates:
        console.print("\n".join(describe_rate(*each)), highlight=False, markup=False)
    console.print(NO_LIMIT, highlight=False)
    record = {"study": study.file.study.name, "images": IMAGES, "rates": [make_record(*each) for each in all_rates]}
    with open_results(study, out, "converge") as root:
        paths = [root / name for name in CONVERGENCE_FILES]
        write_atomically(paths[0], dump(record).encode())
        plots.save_figure(plots.draw_distances(all_rates), paths[1])
        plots.save_figure(plots.draw_loss_curves(found), paths[2])
    return paths
