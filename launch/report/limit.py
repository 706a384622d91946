"""`depthmup limit`: the infinite network of a study's rules, and finite networks on their way to it.

The network is the theory's: a residual MLP with one layer a branch and ReLU, one output, trained by full-batch gradient
descent with momentum on (f - y)^2 / 2. Parameterization, base size and momentum are the study's, inputs are Gaussian
or its images. Over width the limit is the infinitely wide network of the same depth; over depth, that of infinite
depth, too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from depthmup.data.errors import UserError
from depthmup.data.storage import write_atomically
from depthmup.launch.config import StudyFile, label
from depthmup.launch.findings.convergence import LAWS, Line, Rate, fit_rate
from depthmup.launch.findings.theory import COVERED, not_covered
from depthmup.launch.progress import display
from depthmup.launch.report import plots
from depthmup.launch.report.limit_task import (
    DEPTHS,
    QUANTITIES,
    STEPS,
    WIDTHS,
    Limit,
    Task,
    gaussian_task,
    image_task,
    quantities,
    solve,
)
from depthmup.launch.report.record import dump, rate_record
from depthmup.launch.report.tables import print_table, say
from depthmup.launch.runs.study import Study
from depthmup.models.config import OptimizerConfig, ParameterizationConfig, Size
from depthmup.models.limit.drift import has_limit, kernel_at, kernel_in_limit, predicted_drift
from depthmup.models.limit.finite import train_finite
from depthmup.models.limit.kernels import largest_rate

WIDTH_AXIS_DEPTH, DEPTH_AXIS_WIDTH = 6, 512
RATE = 0.125  # of the largest stable rate, where no learning rate is given
SEEDS = {"width": 48, "depth": 16}  # of the networks along an axis
FEW_SEEDS = 4  # of those that have no limit
DIVERGED = 1e3  # outputs beyond it, where targets are 1
FILES = ("limit.json", "limit.png", "limit-loss.png")


# ---------------------------------------------------------------- infinite networks


# ---------------------------------------------------------------- finite networks


def axis_sizes(axis: str) -> list[Size]:
    if axis == "width":
        return [Size(width=width, depth=WIDTH_AXIS_DEPTH) for width in WIDTHS]
    return [Size(width=DEPTH_AXIS_WIDTH, depth=depth) for depth in DEPTHS]


def measure(
    p: ParameterizationConfig,
    base: Size,
    task: Task,
    optimizer: OptimizerConfig,
    limit: Limit,
    axis: str,
    seeds: int,
    progress: Callable[[str], None],
) -> Line:
    """Networks along one axis, trained with every seed, beside `limit` as the size math.inf. A size at which one
    diverges is left out, as no distance says anything of it."""
    values: dict[str, dict[float, np.ndarray]] = {quantity: {} for quantity in QUANTITIES}
    left_out = []
    for size in axis_sizes(axis):
        progress(f"{label(p)}: {size.width} x {size.depth}")
        runs = [train_finite(p, size, base, task.inputs, task.targets, optimizer, STEPS, seed) for seed in range(seeds)]
        outputs, features = np.array([run.outputs for run in runs]), np.array([run.features for run in runs])
        number = size.width if axis == "width" else size.depth
        if np.isfinite(outputs).all() and np.abs(outputs).max() < DIVERGED:
            for quantity, found in quantities(outputs, features, task.targets.double().numpy()).items():
                values[quantity][number] = found
        else:
            left_out.append(f"{axis} {number} (diverges)")
    depth = WIDTH_AXIS_DEPTH if axis == "width" else math.inf
    for quantity in QUANTITIES:
        values[quantity][math.inf] = np.tile(limit.values[quantity][depth], (seeds, 1))
    steps = np.arange(1, STEPS + 1)
    return Line(label(p), axis, optimizer.lr, tuple(range(seeds)), steps, values, ", ".join(left_out))


@dataclass(frozen=True)
class Found:
    """One fitted rate."""

    task: str
    quantity: str
    line: Line
    rate: Rate

    @property
    def agreement(self) -> str:
        """In words, of the exponent with the theory's."""
        rate = self.rate
        if rate.exponent is None:
            return rate.remark
        theory = rate.law.exponent
        if rate.interval is None:
            return f"near {rate.exponent:.2f}, {rate.remark}"
        low, high = rate.interval
        known = (
            "as in theory" if low <= theory <= high else "faster than theory" if low > theory else "slower than theory"
        )
        return known if not rate.remark else f"{known}; {rate.remark}"

    @property
    def row(self) -> dict[str, str]:
        rate = self.rate
        distances = " ".join("noise" if np.isnan(d) else f"{d:.2g}" for d in rate.distance)
        return {
            "rules": self.line.parameterization,
            "of": self.quantity,
            "axis": f"{rate.law.axis}, {rate.law.measure}",
            "distances": distances or "diverges",
            "exponent": "" if rate.exponent is None else f"{rate.exponent:.2f}",
            "interval": "" if rate.interval is None else f"{rate.interval[0]:.2f} to {rate.interval[1]:.2f}",
            "theory": f"{rate.law.exponent:g}",
        }

    @property
    def record(self) -> dict[str, Any]:
        rate = self.rate
        return {
            "task": self.task,
            "quantity": self.quantity,
            "parameterization": self.line.parameterization,
            "axis": rate.law.axis,
            "lr": self.line.value,
            "seeds": len(self.line.seeds),
            **rate_record(rate),
            "left_out": self.line.left_out,
        }


def fitted(task: Task, line: Line, limit: Limit) -> list[Found]:
    found = []
    for quantity, law in product(QUANTITIES, LAWS):
        if law.axis == line.axis:
            depth = WIDTH_AXIS_DEPTH if law.axis == "width" else math.inf
            rate = fit_rate(law, line.values[quantity], limit.error[quantity][depth])
            found.append(Found(task.name, quantity, line, rate))
    return found


# ---------------------------------------------------------------- what is shown


def kernel_rows(file: StudyFile) -> list[dict[str, str]]:
    """Of every parameterization at every size of the study, and in the limit: what one input of norm 1 gives."""
    base = Size(width=file.model.base_width, depth=file.model.base_depth)
    rows = []
    for p in file.study.parameterizations:
        resolved = p.resolve()
        shapes = dict.fromkeys((size.width, size.depth) for size in file.study.sizes)  # some differ in the batch alone
        sizes: list[Size | None] = [Size(width=width, depth=depth) for width, depth in shapes]
        for size in [*sizes, None] if has_limit(resolved) else sizes:
            if size:
                kernel = kernel_at(resolved, size, base, base.width)
            else:
                kernel = kernel_in_limit(resolved, base, base.width)
            rows.append(
                {
                    "parameterization": label(p),
                    "width": str(size.width) if size else "limit",
                    "depth": str(size.depth) if size else "limit",
                    "kernel": f"{kernel[0, 0]:.4g}",
                    "largest rate": f"{largest_rate(kernel, file.optimizer.momentum):.3g}",
                    "predicted drift": f"{predicted_drift(resolved, base, size):+.2f}",
                }
            )
    return rows


def verdicts(found: list[Found]) -> list[str]:
    """In words: how each parameterization with a limit nears it, and what the others do."""
    said = []
    for each in found:
        if each.quantity == "outputs":
            name = f"{each.line.parameterization}, {each.task}, {each.rate.law.measure} over {each.rate.law.axis}"
            left_out = f"; left out: {each.line.left_out}" if each.line.left_out else ""
            exponent = "" if each.rate.exponent is None else f"exponent {each.rate.exponent:.2f}, "
            said.append(f"{name}: {exponent}{each.agreement}{left_out}")
    return said


def show_sizes() -> str:
    widths, depths = (", ".join(map(str, sizes)) for sizes in (WIDTHS, DEPTHS))
    return f"widths {widths} at depth {WIDTH_AXIS_DEPTH}, depths {depths} at width {DEPTH_AXIS_WIDTH}"


def learning_rate(p: ParameterizationConfig, base: Size, task: Task, momentum: float, given: float | None) -> float:
    """`given`, or a share of the largest stable one. Raises UserError for one that is past it at some depth."""
    resolved, inputs = p.resolve(), task.inputs.shape[1]
    kernels = [kernel_at(resolved, Size(width=base.width, depth=depth), base, inputs, task.kernel) for depth in DEPTHS]
    kernels.append(kernel_in_limit(resolved, base, inputs, task.kernel))
    edge = min(largest_rate(kernel, momentum) for kernel in kernels)
    if given is not None and given >= edge:
        raise UserError(
            f"--lr {given:g} is past the edge of stability of {label(p)} on {task.name}: the infinite network "
            f"diverges; use a rate below {edge:.3g}"
        )
    return RATE * edge if given is None else given


def refuse_not_covered(study: Study) -> list[ParameterizationConfig]:
    """The study's parameterizations that have a limit. Raises UserError where the theory does not cover it."""
    file = study.file
    if reason := not_covered(file):
        raise UserError(f"{study.path}: the theory's limit does not cover {reason}; it is for {COVERED}")
    limited = [p for p in file.study.parameterizations if has_limit(p.resolve())]
    if not limited:
        raise UserError(f"{study.path}: none of study.parameterizations has a limit: add depth_mup or completep")
    return limited


def run_task(
    file: StudyFile, limited: list[ParameterizationConfig], task: Task, lr: float | None, console: Console
) -> list[Found]:
    """Every parameterization beside its limit; one that has none beside that of the first which has, at its rate."""
    base, momentum = Size(width=file.model.base_width, depth=file.model.base_depth), file.optimizer.momentum
    others = [p for p in file.study.parameterizations if p not in limited]
    found, total = [], 2 * len(file.study.parameterizations) * len(WIDTHS) + len(limited)
    started = 0
    with display(console, task.name) as shown:

        def progress(what: str) -> None:
            nonlocal started
            shown.update(started / total, what)
            started += 1

        first: tuple[OptimizerConfig, Limit] | None = None
        for p in [*limited, *others]:
            if p in limited:
                optimizer = OptimizerConfig(
                    name="sgd", lr=learning_rate(p, base, task, momentum, lr), momentum=momentum
                )
                progress(f"{label(p)}: infinite width")
                limit = solve(p, base, task, optimizer)
                first = first or (optimizer, limit)
            else:
                assert first is not None
                optimizer, limit = first
            for axis in ("width", "depth"):
                seeds = SEEDS[axis] if p in limited else FEW_SEEDS
                line = measure(p, base, task, optimizer, limit, axis, seeds, progress)
                found += fitted(task, line, limit)
        shown.update(1, "done", final=True)
    return found


def limit_command(study: Study, lr: float | None, console: Console) -> list[Path]:
    """Prints what the limit is and how networks near it; writes FILES into the study's folder and returns their paths.

    Raises UserError for a study that the theory does not cover, and for a rate past the edge of stability.
    """
    limited, file = refuse_not_covered(study), study.file
    study.check_writable()
    file.directory.mkdir(parents=True, exist_ok=True)
    kernels = kernel_rows(file)
    say(console, "The tangent kernel of one input at the start, and the largest stable rate on the squared loss:")
    print_table(kernels, ("parameterization",), console)
    found: list[Found] = []
    for task in (gaussian_task(file.model.base_width), image_task(file)):
        own = run_task(file, limited, task, lr, console)
        found += own
        say(console, f"{task.name}: distances to the limit, in the order of {show_sizes()}")
        print_table([each.row for each in own], ("rules", "of", "axis", "distances"), console)
    said = verdicts(found)
    for sentence in said:
        say(console, sentence)
    paths = [file.directory / name for name in FILES]
    record = {"study": file.study.name, "kernels": kernels, "rates": [each.record for each in found], "verdict": said}
    write_atomically(paths[0], dump(record).encode())
    plots.save(plots.distances([(each.line, f"{each.quantity}, {each.task}", each.rate) for each in found]), paths[1])
    plots.save(plots.loss_curves(list({id(each.line): each.line for each in found}.values())), paths[2])
    return paths
