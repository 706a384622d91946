"""`depthmup plan`: what a study would run and cost."""

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from depthmup.data.index import show_count
from depthmup.launch.config import Size
from depthmup.launch.findings.share import SURE, Share
from depthmup.launch.findings.theory import describe_drifts
from depthmup.launch.runs.cost import count_flops
from depthmup.launch.runs.design import build_design
from depthmup.launch.runs.fits import check_fits
from depthmup.launch.runs.grouping import (
    assign_gpus,
    find_obstacle,
    group_packs,
    make_packs,
    trains_on_gpu,
    trains_one_by_one,
)
from depthmup.launch.runs.search import Search, prune_steps
from depthmup.launch.runs.seconds import estimate_seconds
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.verification import Verification
from depthmup.launch.values import Dimension, Range
from depthmup.launch.wording import show_duration, show_power, show_quantity, show_share, show_times, wrap_line
from depthmup.train.packs.packing import may_differ, pack_limit


def describe_jobs(study: Study) -> list[str]:
    """What a launch now would submit or start: lines of at most 80 columns; none when all is done."""
    config, pending = study.file.launch, study.pending()
    if not pending:
        return []
    packs = make_packs(pending, config)
    largest = max(sum(run.trunk is None for run in pack) for pack in packs)  # branches come after their trunks
    packed = f", in packs of up to {largest}" if largest > 1 else ""
    if config.cluster != "slurm":
        slots = 1 if config.cluster == "debug" else min(len(assign_gpus(config)), len(packs))
        return [f"{len(pending)} runs here, {show_count(slots, 'process')} at once{packed}"]
    tasks = group_packs(packs, config.runs_per_job)
    in_each = max(map(len, tasks))
    gpus = config.nodes * config.gpus_per_node
    nodes = f"{config.nodes} nodes, " if config.nodes > 1 else ""
    hardware = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else f"{config.tasks * config.cpus_per_task} CPUs"
    at_once = min(config.max_running, len(tasks))
    lines = [
        f"{show_count(len(tasks), 'job')} of up to {show_count(in_each, 'run')}{packed}, at most {at_once} at once",
        f"each job: {nodes}{hardware}, up to {show_duration(60 * config.timeout_min)}",
    ]
    if gpus and largest > 1 and study.file.train.pack is None:
        lines.append("the packs are assumed: how many fit, a job finds on its own GPU")
    return lines


def describe_packs(study: Study, varied: Iterable[str]) -> list[str]:
    """What keeps the study's runs from being trained together where packs would pay: `varied` are the keys in which
    they differ."""
    run, config = study.examples[0], study.file.launch
    if pack_limit(run.config, trains_on_gpu(config)) == 1:
        return []
    if obstacle := find_obstacle(run, config):
        return [f"no packs: {obstacle}"]
    return [f"runs that differ in {key} share no pack" for key in varied if not may_differ(key)]


def describe_growth(study: Study) -> list[str]:
    """What may be added to these runs: rounds of an adaptive design, with what they cost, or values and seeds of a
    grid."""
    settings = study.file.study
    if settings.adaptive:
        from depthmup.launch.findings.design import estimate_cost

        design = build_design(study)
        cost, rounds = estimate_cost(design)
        return [
            f"adaptive: these are the runs of {show_count(len(study.rounds()), 'round')} so far. All rounds:",
            f"about {show_quantity(cost)}FLOPs in {rounds} rounds where nothing drifts and runs differ by 1 %,",
            f"at most {show_quantity(design.budget)}FLOPs (study.budget)",
        ]
    lines = []
    if rounds := settings.extend:
        lines.append(f"and 2 values more, up to {rounds} times, where the best is on the edge (study.extend)")
    if rounds := settings.more_seeds:
        lines.append(f"and 1 seed more, up to {rounds} times, where noise decides (study.more_seeds)")
    return lines


def print_search_plan(search: Search, console: Console) -> None:
    """What a search tunes, how many runs it trains, and what they cost."""
    settings, known = search.settings, len(search.trials())
    print_space(settings.space, console)
    searched, again = search.expected * len(settings.seeds), settings.most_winners * settings.rerun_seeds
    ((parameters, _),) = count_flops(search.examples).values()
    done = sum(bool(run.done()) for run in search.runs)
    at_once = f" {search.batch} suggestions at once"
    if search.batch == 1:
        because = not settings.batch and trains_one_by_one(search.file)
        at_once = "\none at a time" + (", since one process trains them on a CPU (tune.batch)" if because else "")
    console.print(
        f"\n{searched + again} runs of {parameters:,} parameters ({done} done), "
        f"{show_quantity(search.total_flops)}FLOPs in all:\n"
        f"{search.expected} suggestions ({known} made, {settings.sampler}) x {show_count(len(settings.seeds), 'seed')},"
        f"{at_once};\n"
        f"the best {settings.most_winners} again with {settings.rerun_seeds} new seeds",
        highlight=False,
    )
    lines = [*describe_packs(search, settings.space), *describe_jobs(search)]
    if settings.sampler == "tpe" and search.expected <= search.journal.startup:
        first = search.journal.startup + 1
        lines.insert(0, f"so few are spread evenly over the space: tpe would choose from suggestion {first} on")
    if settings.prune:
        steps = ", ".join(map(str, prune_steps(settings.prune, search.file.train.num_steps)))
        more = ", and the budget then pays for more suggestions" if settings.flops else ""
        lines.insert(0, f"runs above the median after step {steps} are ended early{more}")
    if lines:
        console.print(*map(wrap_line, lines), sep="\n", highlight=False)


def print_verification_plan(verification: Verification, console: Console) -> None:
    """What a verification perturbs, how many runs it trains, and what they cost."""
    settings, (each, _) = verification.settings, verification.flops
    print_space(verification.space, console)
    runs = verification.runs
    done = sum(bool(run.done()) for run in runs)
    lines = [
        f"{len(runs)} runs at {verification.size} ({done} done), {show_quantity(len(runs) * each)}FLOPs in all, "
        f"{show_times(verification.cost)} times one run of this file (verify.budget {settings.budget:g}): "
        f"{settings.runs} perturbed, and the file's own values with {show_count(len(settings.seeds), 'seed')}.",
        f"Where none is better, they are among the best {show_share(Share(0, settings.runs).high)} with {SURE:.0%} "
        "confidence",
        *describe_packs(verification, verification.space),
        *describe_jobs(verification),
    ]
    console.print("", *map(wrap_line, lines), sep="\n", highlight=False)


def print_space(space: Mapping[str, Dimension], console: Console) -> None:
    table = Table("hyperparameter", "space", box=None, pad_edge=False)
    for key, dimension in space.items():
        text = (
            f"{show_end(dimension.first)} to {show_end(dimension.last)} ({dimension.scale})"
            if isinstance(dimension, Range)
            else ", ".join(map(str, dimension))
        )
        table.add_row(key, text)
    console.print(table)


def show_end(value: float) -> str:
    return show_power(value) if 0 < value < 0.1 else f"{value:g}"


def print_plan(study: Study, console: Console) -> None:
    """What the study runs and what it costs, in 80 columns. Raises UserError for runs that do not fit where they are to
    run."""
    check_fits(study)
    if isinstance(study, Search):
        print_search_plan(study, console)
    elif isinstance(study, Verification):
        print_verification_plan(study, console)
    else:
        print_grid_plan(study, console)


Flops = Mapping[Size, tuple[int, int]]  # of each size: parameters, and FLOPs of a run


def print_grid_plan(study: Study, console: Console) -> None:
    """One line per run, then the totals per size and the jobs."""
    flops = count_flops(study.runs)
    console.out("\n".join(describe_runs(study, flops)), highlight=False)
    console.print()
    console.print(tabulate_sizes(study, flops))
    base = study.file.model.base_size
    if smaller := [str(size) for size in flops if size.width < base.width or size.depth < base.depth]:
        them = smaller[0] if len(smaller) == 1 else f"{len(smaller)} of these sizes"
        larger = f"base width {base.width}, depth {base.depth} is larger than {them}: factors scale down"
        console.print(f"\n{wrap_line(larger)}", highlight=False)
    for sentence in describe_drifts(study.file):
        console.print(f"\n{wrap_line(sentence)}", highlight=False)
    lines = [
        *describe_cost(study, flops),
        *describe_packs(study, [study.file.study.hyperparameter]),
        *describe_jobs(study),
        *describe_savings(study, flops),
        *describe_growth(study),
    ]
    console.print("", *map(wrap_line, lines), sep="\n", highlight=False)


def describe_runs(study: Study, flops: Flops) -> list[str]:
    """A table as text: one of rich takes seconds for thousands of rows."""
    runs = study.runs
    width = max(len(run.parameterization) for run in runs)
    name = study.file.study.hyperparameter.split(".")[-1]
    axes = runs[0].size.axes
    widths = [max(len(axis), *(len(str(getattr(run.size, axis))) for run in runs)) for axis in axes]
    headings = "  ".join(f"{axis:>{columns}}" for axis, columns in zip(axes, widths, strict=True))
    lines = [f"{'run':12}  {'':{width}}  {headings}  {name:>9}  seed   FLOPs"]
    for run in runs:
        shape = "  ".join(f"{each:>{columns}}" for each, columns in zip(run.size.axes.values(), widths, strict=True))
        cost = f"{show_quantity(flops[run.size][1]):>6}{'  done' if run.done() else ''}"
        cells = f"{show_power(run.value):>9}  {run.seed:4}  {cost}"
        lines.append(f"{run.directory.path.name}  {run.parameterization:{width}}  {shape}  {cells}")
    return lines


def sum_flops_of_runs(study: Study, flops: Flops, size: Size) -> float:
    """All runs of `size` together, without what branches of a ladder take over from their trunks."""
    return sum(run.share * flops[size][1] for run in study.runs if run.size == size)


def tabulate_sizes(study: Study, flops: Flops) -> Table:
    totals = Table(box=None, pad_edge=False)
    for heading in ("size", "parameters", "runs", "FLOPs a run", "FLOPs"):
        totals.add_column(heading, justify="left" if heading == "size" else "right")
    for size, (parameters, each) in flops.items():
        count, of_all = sum(run.size == size for run in study.runs), sum_flops_of_runs(study, flops, size)
        totals.add_row(str(size), f"{parameters:,}", str(count), show_quantity(each), show_quantity(of_all))
    return totals


def describe_cost(study: Study, flops: Flops) -> list[str]:
    """In FLOPs, in runs of the largest size, and in hours where runs are done."""
    total, largest = (
        sum(sum_flops_of_runs(study, flops, size) for size in flops),
        max(each for _, each in flops.values()),
    )
    finished = [(run, done) for run in study.runs if (done := run.done())]
    lines = [
        f"{show_count(len(study.runs), 'run')} ({len(finished)} done), {show_quantity(total)}FLOPs in all",
        f"{show_times(total / largest)} times the cost of one run of the largest of these sizes",
    ]
    known: dict[Size, list[float]] = {}
    for run, done in finished:
        if done["outcome"] == "completed":
            known.setdefault(run.size, []).append(done.get("seconds", 0.0))
    of_size = {size: each for size, (_, each) in flops.items()}
    if each_takes := estimate_seconds(of_size, known, study.file.train.num_steps):
        hours = sum(each_takes[run.size] for run in study.runs) / 3600
        lines.append(f"about {hours:.2g} hours of training in all, as the runs that are done took")
    return lines


def describe_savings(study: Study, flops: Flops) -> list[str]:
    """What need not be trained, or not as a whole."""
    lines = []
    if branches := sum(run.trunk is not None for run in study.runs):
        alone = show_quantity(sum(flops[run.size][1] for run in study.runs))
        lines.append(
            f"a ladder: {branches} of the runs branch off longer ones and train their decay alone; without it "
            f"{alone}FLOPs"
        )
    if shared := len(study.points) - len(study.runs):
        lines.append(f"{shared} more points need no run: there the parameterizations are the same")
    return lines
