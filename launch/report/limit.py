"""`depthmup limit`: the infinite network of a study's rules, and finite networks on their way to it.

The network is the theory's: a residual MLP with one layer a branch, one output, trained by full-batch gradient descent
with momentum on (f - y)^2 / 2. Parameterization, base size, activation and momentum are the study's, inputs are
Gaussian or its images. Networks of every width and depth of a grid are trained with every seed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.scan import map_in_processes
from depthmup.launch.config import StudyFile, show_label
from depthmup.launch.findings.convergence import LAWS
from depthmup.launch.findings.grid import GridRate, fit_grid, list_points
from depthmup.launch.findings.theory import COVERED, explain_not_covered, find_activation
from depthmup.launch.progress import display
from depthmup.launch.report import plots
from depthmup.launch.report.limit_plots import draw_distances, draw_loss_curves
from depthmup.launch.report.limit_task import (
    DEPTHS,
    QUANTITIES,
    STEPS,
    WIDTHS,
    Grid,
    Limit,
    Task,
    draw_task,
    flatten_quantities,
    load_task,
    solve_limit,
)
from depthmup.launch.report.record import convert_interval, convert_number, dump
from depthmup.launch.report.tables import print_sentence, print_table
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.written import check_writable
from depthmup.models.config import Size
from depthmup.models.limit.drift import compute_kernel_at, compute_kernel_in_limit, has_limit, predict_drift
from depthmup.models.limit.finite import train_finite
from depthmup.models.limit.kernels import find_largest_rate
from depthmup.models.limit.network import ActivationName
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization_config import ParameterizationConfig

RATE = 0.125  # of the largest stable rate, where no learning rate is given
SEEDS, FEW_SEEDS = 64, 4  # of a size; of one whose rules have no limit
DIVERGED = 1e3  # outputs beyond it, where targets are 1
FILES = ("limit.json", "limit.png", "limit-loss.png")


# ---------------------------------------------------------------- finite networks


def train_size(
    p: ParameterizationConfig,
    optimizer: OptimizerConfig,
    size: Size,
    base: Size,
    activation: ActivationName,
    task: Task,
    seeds: int,
) -> dict[str, np.ndarray] | None:
    """The networks of one size: quantity -> (seeds, entries), or None where one diverges."""
    torch.set_num_threads(1)  # each size has a process, and each process a core
    runs = [
        train_finite(p, size, base, task.inputs, task.targets, optimizer, STEPS, seed, activation)
        for seed in range(seeds)
    ]
    outputs, features = np.array([run.outputs for run in runs]), np.array([run.features for run in runs])
    if not (np.isfinite(outputs).all() and np.abs(outputs).max() < DIVERGED):
        return None
    return flatten_quantities(outputs, features, task.targets.double().numpy())


def train_sizes(
    optimizers: dict[str, tuple[ParameterizationConfig, OptimizerConfig]],
    base: Size,
    activation: ActivationName,
    task: Task,
    progress: Callable[[str], None],
) -> list[Grid]:
    """A grid for each of `optimizers`. Networks of all sizes are trained side by side, on the cores of this machine."""
    shapes = sorted(product(WIDTHS, DEPTHS), key=lambda shape: shape[0] ** 2 * shape[1], reverse=True)  # longest first
    jobs = [(name, Size(width=width, depth=depth)) for width, depth in shapes for name in optimizers]
    seeds = {name: SEEDS if has_limit(p.resolve()) else FEW_SEEDS for name, (p, _) in optimizers.items()}
    arguments = [(*optimizers[name], size, base, activation, task, seeds[name]) for name, size in jobs]
    trained = dict[tuple[str, tuple[int, int]], dict[str, np.ndarray] | None]()
    for (name, size), found in zip(
        jobs, map_in_processes(train_size, None, *zip(*arguments, strict=True)), strict=True
    ):
        progress(f"{name}: {size.width} x {size.depth}")
        trained[name, (size.width, size.depth)] = found
    grids = []
    for name, (p, optimizer) in optimizers.items():
        of_shape = {shape: trained[name, shape] for shape in product(WIDTHS, DEPTHS)}
        values = {
            quantity: {shape: found[quantity] for shape, found in of_shape.items() if found} for quantity in QUANTITIES
        }
        diverged = [shape for shape, found in of_shape.items() if not found]
        grids.append(Grid(task, name, has_limit(p.resolve()), optimizer.lr, seeds[name], values, diverged))
    return grids


@dataclass(frozen=True)
class Found:
    """One fitted rate."""

    grid: Grid
    quantity: str
    rate: GridRate

    @property
    def agreement(self) -> str:
        """In words, of the exponent with the theory's."""
        if self.rate.interval is None:
            return self.rate.remark
        (low, high), theory = self.rate.interval, self.rate.law.exponent
        known = (
            "as in theory" if low <= theory <= high else "faster than theory" if low > theory else "slower than theory"
        )
        return known if not self.rate.remark else f"{known}; {self.rate.remark}"

    @property
    def row(self) -> dict[str, str]:
        rate = self.rate
        return {
            "rules": self.grid.parameterization,
            "of": self.quantity,
            "axis": f"{rate.law.axis}, {rate.law.measure}",
            "exponent": "" if rate.exponent is None else f"{rate.exponent:.2f}",
            "interval": "" if rate.interval is None else f"{rate.interval[0]:.2f} to {rate.interval[1]:.2f}",
            "theory": f"{rate.law.exponent:g}" if self.grid.has_limit else "none",
        }

    @property
    def record(self) -> dict[str, Any]:
        rate = self.rate
        return {
            "task": self.grid.task.name,
            "quantity": self.quantity,
            "parameterization": self.grid.parameterization,
            "axis": rate.law.axis,
            "measure": rate.law.measure,
            "lr": self.grid.lr,
            "seeds": self.grid.seeds,
            "lines": [convert_number(line) for line in rate.lines.tolist()],
            "sizes": rate.sizes.tolist(),
            "distance": [convert_number(d) for d in rate.distance.tolist()],
            "error": [convert_number(e) for e in rate.error.tolist()],
            "exponent": convert_number(rate.exponent),
            "interval": convert_interval(rate.interval),
            "next_order": convert_number(rate.next_order),
            "theory": rate.law.exponent,
            "remark": rate.remark,
            "diverged": self.grid.diverged,
        }


def fit_rates(grid: Grid, limit: Limit) -> list[Found]:
    """Rules without a limit stand beside that of others, over width alone: at no width do they near it."""
    laws = [law for law in LAWS if grid.has_limit or law.axis == "width"]
    return [
        Found(grid, quantity, fit_grid(law, list_points(law, grid.values[quantity], limit[quantity])))
        for quantity, law in product(QUANTITIES, laws)
    ]


# ---------------------------------------------------------------- what is shown


def list_kernel_rows(file: StudyFile) -> list[dict[str, str]]:
    """Of every parameterization at every size of the study, and in the limit: what one input of norm 1 gives."""
    base, activation = Size(width=file.model.base_width, depth=file.model.base_depth), find_activation(file)
    rows = []
    for p in file.study.parameterizations:
        resolved = p.resolve()
        shapes = dict.fromkeys((size.width, size.depth) for size in file.study.sizes)  # some differ in the batch alone
        sizes: list[Size | None] = [Size(width=width, depth=depth) for width, depth in shapes]
        for size in [*sizes, None] if has_limit(resolved) else sizes:
            if size:
                kernel = compute_kernel_at(resolved, size, base, base.width, activation=activation)
            else:
                kernel = compute_kernel_in_limit(resolved, base, base.width, activation=activation)
            rows.append(
                {
                    "parameterization": show_label(p),
                    "width": str(size.width) if size else "limit",
                    "depth": str(size.depth) if size else "limit",
                    "kernel": f"{kernel[0, 0]:.4g}",
                    "largest rate": f"{find_largest_rate(kernel, file.optimizer.momentum):.3g}",
                    "predicted drift": f"{predict_drift(resolved, base, size, activation):+.2f}",
                }
            )
    return rows


def list_distance_rows(found: list[Found]) -> list[dict[str, str]]:
    """Of the outputs: a row for every parameterization, measure and depth, a column for every width ("-" where networks
    diverge); of means, the last column is that of networks extrapolated to infinite width, to the limit of both."""
    shown = {
        (each.grid.parameterization, each.rate.law.measure, size[0], size[1]): "noise" if math.isnan(d) else f"{d:.2g}"
        for each in found
        if each.quantity == "outputs"
        for size, d in zip(zip(each.rate.lines, each.rate.sizes, strict=True), each.rate.distance, strict=True)
    }
    names = dict.fromkeys((each.grid.parameterization, each.rate.law.measure) for each in found)
    return [
        {
            "rules": name,
            "of": train_sizes,
            "depth": str(depth),
            **{str(width): shown.get((name, train_sizes, depth, width), "-") for width in WIDTHS},
            "inf": shown.get((name, train_sizes, math.inf, depth), ""),
        }
        for (name, train_sizes), depth in product(names, DEPTHS)
    ]


def describe_verdicts(found: list[Found]) -> list[str]:
    """In words: how each parameterization with a limit nears it, and what the others do."""
    said = []
    for grid in {id(each.grid): each.grid for each in found}.values():
        name, own = f"{grid.parameterization}, {grid.task.name}", [each for each in found if each.grid is grid]
        diverged = ", ".join(f"{width} x {depth}" for width, depth in grid.diverged)
        diverged = f"; networks of {diverged} diverge" if diverged else ""
        if not grid.has_limit:
            outputs = {each.rate.law.measure: each.rate for each in own if each.quantity == "outputs"}
            scatter = outputs["scatter"].distance
            resolved = scatter[np.isfinite(scatter)]
            least = f"by {resolved.min():.2g} or more, relative" if len(resolved) else "beyond measure"
            said.append(f"{name}: has no limit: outputs scatter {least}{diverged}")
            continue
        resolved_rates = [each for each in own if each.rate.interval]
        holds = sum(each.agreement.startswith("as in theory") for each in resolved_rates)
        said.append(f"{name}: {holds} of {len(resolved_rates)} intervals hold the theory's exponent{diverged}")
        for each in own:
            if not each.agreement.startswith("as in theory"):
                said.append(f"  {each.quantity}, {each.rate.law.measure} over {each.rate.law.axis}: {each.agreement}")
    return said


def choose_learning_rate(
    p: ParameterizationConfig,
    base: Size,
    activation: ActivationName,
    task: Task,
    momentum: float,
    given: float | None,
) -> float:
    """`given`, or a share of the largest stable one. Raises UserError for one that is past it at some depth."""
    resolved, inputs = p.resolve(), task.inputs.shape[1]
    sizes = [Size(width=base.width, depth=depth) for depth in DEPTHS]
    kernels = [compute_kernel_at(resolved, size, base, inputs, task.kernel, activation) for size in sizes]
    kernels.append(compute_kernel_in_limit(resolved, base, inputs, task.kernel, activation))
    edge = min(find_largest_rate(kernel, momentum) for kernel in kernels)
    if given is not None and given >= edge:
        raise UserError(
            f"--lr {given:g} is past the edge of stability of {show_label(p)} on {task.name}: the infinite network "
            f"diverges; use a rate below {edge:.3g}"
        )
    return RATE * edge if given is None else given


def refuse_not_covered(study: Study) -> list[ParameterizationConfig]:
    """The study's parameterizations that have a limit. Raises UserError where the theory does not cover it."""
    file = study.file
    if reason := explain_not_covered(file):
        raise UserError(f"{study.path}: the theory's limit does not cover {reason}; it is for {COVERED}")
    limited = [p for p in file.study.parameterizations if has_limit(p.resolve())]
    if not limited:
        raise UserError(f"{study.path}: none of study.parameterizations has a limit: add depth_mup or completep")
    return limited


def run_task(
    file: StudyFile, limited: list[ParameterizationConfig], task: Task, lr: float | None, console: Console
) -> tuple[list[Found], Limit]:
    """Every parameterization beside its limit; one that has none beside that of the first which has, at its rate."""
    base, momentum = Size(width=file.model.base_width, depth=file.model.base_depth), file.optimizer.momentum
    activation = find_activation(file)
    found, limits = list[Found](), dict[str, Limit]()
    total = len(file.study.parameterizations) * len(WIDTHS) * len(DEPTHS) + len(limited)
    started = 0
    with display(console, task.name) as shown:

        def progress(what: str) -> None:
            nonlocal started
            shown.update(started / total, what)
            started += 1

        optimizers = {}
        for p in limited:
            rate = choose_learning_rate(p, base, activation, task, momentum, lr)
            optimizer = OptimizerConfig(name="sgd", lr=rate, momentum=momentum)
            progress(f"{show_label(p)}: infinite width")
            limits[show_label(p)] = solve_limit(p, base, activation, task, optimizer)
            optimizers[show_label(p)] = p, optimizer
        first = next(iter(limits))
        for p in file.study.parameterizations:
            optimizers.setdefault(show_label(p), (p, optimizers[first][1]))
        for grid in train_sizes(optimizers, base, activation, task, progress):
            found += fit_rates(grid, limits.get(grid.parameterization, limits[first]))
        shown.update(1, "done", final=True)
    return found, limits[first]


def limit_command(study: Study, lr: float | None, console: Console) -> list[Path]:
    """Prints what the limit is and how networks near it; writes FILES into the study's folder and returns their paths.

    Raises UserError for a study that the theory does not cover, and for a rate past the edge of stability.
    """
    limited, file = refuse_not_covered(study), study.file
    check_writable(study.file.directory)
    file.directory.mkdir(parents=True, exist_ok=True)
    kernels = list_kernel_rows(file)
    print_sentence(
        console, "The tangent kernel of one input at the start, and the largest stable rate on the squared loss:"
    )
    print_table(kernels, ("parameterization",), console)
    found: list[Found] = []
    limits: dict[str, Limit] = {}
    for task in (draw_task(file.model.base_width), load_task(file)):
        own, limits[task.name] = run_task(file, limited, task, lr, console)
        found += own
        print_sentence(console, f"\n{task.name}: distances of outputs to the limit, by width, relative (-: diverges)")
        print_table(list_distance_rows(own), ("rules", "of"), console)
        print_sentence(console, f"\n{task.name}: fitted exponents, with the next order")
        print_table([each.row for each in own], ("rules", "of", "axis"), console)
    said = describe_verdicts(found)
    print_sentence(console, "")
    for sentence in said:
        print_sentence(console, sentence)
    paths = [file.directory / name for name in FILES]
    record = {"study": file.study.name, "kernels": kernels, "rates": [each.record for each in found], "verdict": said}
    write_atomically(paths[0], dump(record).encode())
    plots.save_figure(draw_distances([(each.grid, each.quantity, each.rate) for each in found]), paths[1])
    plots.save_figure(draw_loss_curves(list({id(each.grid): each.grid for each in found}.values()), limits), paths[2])
    return paths
