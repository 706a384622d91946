"""`depthmup plan`: what a study would run and cost."""

from rich.console import Console
from rich.table import Table

from launch.cost import count_flops
from launch.study import Study


def quantity(value: float) -> str:
    """1234567 -> '1.23 M'."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def print_plan(study: Study, console: Console) -> None:
    """One line per run, then the totals per size."""
    flops = count_flops(study.runs)
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "parameterization", "width", "depth", study.file.study.hyperparameter, "seed", "FLOPs"):
        table.add_column(heading, justify="right" if heading in ("width", "depth", "seed", "FLOPs") else "left")
    for run in study.runs:
        cells = (str(run.size.width), str(run.size.depth), f"{run.value:.4g}", str(run.seed))
        name = run.directory.path.name + (" done" if run.directory.done() else "")
        table.add_row(name, run.parameterization, *cells, quantity(flops[run.size][1]))
    console.print(table)

    totals = Table(box=None, pad_edge=False)
    for heading in ("size", "parameters", "runs", "FLOPs a run", "FLOPs"):
        totals.add_column(heading, justify="left" if heading == "size" else "right")
    everything = 0
    for size, (parameters, each) in flops.items():
        count = sum(run.size == size for run in study.runs)
        everything += count * each
        totals.add_row(str(size), f"{parameters:,}", str(count), quantity(each), quantity(count * each))
    console.print("\n", totals, sep="")
    done = len(study.runs) - len(study.pending())
    console.print(f"\n{len(study.runs)} runs ({done} done), {quantity(everything)}FLOPs in all", highlight=False)
