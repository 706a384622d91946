"""`depthmup plan`: what a study would run and cost."""

import textwrap
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from depthmup.data.index import counted
from depthmup.launch.config import Size
from depthmup.launch.findings.share import SURE, Share
from depthmup.launch.findings.theory import expected_drifts
from depthmup.launch.runs.cost import count_flops
from depthmup.launch.runs.design import design_of
from depthmup.launch.runs.fits import check_fits
from depthmup.launch.runs.grouping import find_obstacle, group_packs, make_packs, slot_gpus, trains_on_gpu
from depthmup.launch.runs.search import Search, prune_steps
from depthmup.launch.runs.seconds import expected_seconds
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.verification import Verification
from depthmup.launch.values import Dimension, Range
from depthmup.launch.wording import duration, power_of_two, quantity, show_share, show_times
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
        slots = 1 if config.cluster == "debug" else min(len(slot_gpus(config)), len(packs))
        return [f"{len(pending)} runs here, {counted(slots, 'process')} at once{packed}"]
    tasks = group_packs(packs, config.runs_per_job)
    in_each = max(map(len, tasks))
    gpus = config.nodes * config.gpus_per_node
    nodes = f"{config.nodes} nodes, " if config.nodes > 1 else ""
    hardware = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else f"{config.tasks * config.cpus_per_task} CPUs"
    at_once = min(config.max_running, len(tasks))
    lines = [
        f"{counted(len(tasks), 'job')} of up to {counted(in_each, 'run')}{packed}, at most {at_once} at once",
        f"each job: {nodes}{hardware}, up to {duration(60 * config.timeout_min)}",
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


def describe_design(study: Study, console: Console) -> None:
    """What the rounds of an adaptive design are expected to cost, and what they cost at most."""
    from depthmup.launch.findings.design import expected_cost

    design = design_of(study)
    cost, rounds = expected_cost(design)
    least = f"about {quantity(cost)}FLOPs in {rounds} rounds where nothing drifts and runs differ by 1 %"
    console.print(
        f"adaptive: these are the runs of {counted(len(study.rounds()), 'round')} so far. All rounds:", highlight=False
    )
    console.print(f"{least},\nat most {quantity(design.budget)}FLOPs (study.budget)", highlight=False)


def print_search_plan(search: Search, console: Console) -> None:
    """What a search tunes, how many runs it trains, and what they cost."""
    settings, known = search.settings, len(search.trials())
    print_space(settings.space, console)
    searched, again = search.expected * len(settings.seeds), settings.most_winners * settings.rerun_seeds
    ((parameters, _),) = count_flops(search.examples).values()
    done = sum(bool(run.done()) for run in search.runs)
    console.print(
        f"\n{searched + again} runs of {parameters:,} parameters ({done} done), "
        f"{quantity(search.total_flops)}FLOPs in all:\n"
        f"{search.expected} suggestions ({known} made, {settings.sampler}) x {counted(len(settings.seeds), 'seed')}, "
        f"{settings.batch} suggestions at once;\n"
        f"the best {settings.most_winners} again with {settings.rerun_seeds} new seeds",
        highlight=False,
    )
    if settings.prune:
        steps = ", ".join(map(str, prune_steps(settings.prune, search.file.train.num_steps)))
        more = ", and the budget then pays for more suggestions" if settings.flops else ""
        console.print(f"runs above the median after step {steps} are ended early{more}", highlight=False)
    console.print("\n".join([*describe_packs(search, settings.space), *describe_jobs(search)]), highlight=False)


def print_verification_plan(verification: Verification, console: Console) -> None:
    """What a verification perturbs, how many runs it trains, and what they cost."""
    settings, (each, _) = verification.settings, verification.flops
    print_space(verification.space, console)
    runs = verification.runs
    done = sum(bool(run.done()) for run in runs)
    console.print(
        f"\n{len(runs)} runs at {verification.size} ({done} done), {quantity(len(runs) * each)}FLOPs in all, "
        f"{show_times(verification.cost)} times one\nrun of this file (verify.budget {settings.budget:g}): "
        f"{settings.runs} perturbed, and the file's own values with {counted(len(settings.seeds), 'seed')}.\n"
        f"Where none is better, they are among the best {show_share(Share(0, settings.runs).high)} with {SURE:.0%} "
        "confidence",
        highlight=False,
    )
    jobs = [*describe_packs(verification, verification.space), *describe_jobs(verification)]
    console.print("\n".join(jobs), highlight=False)


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
    return power_of_two(value) if 0 < value < 0.1 else f"{value:g}"


def print_plan(study: Study, console: Console) -> None:
    """One line per run, then the totals per size and the jobs. 80 columns. Raises UserError for runs that do not fit
    where they are to run."""
    check_fits(study)
    if isinstance(study, Search):
        print_search_plan(study, console)
        return
    if isinstance(study, Verification):
        print_verification_plan(study, console)
        return
    flops = count_flops(study.runs)
    runs = [(run, run.done()) for run in study.runs]
    # text rather than a rich table, which takes seconds for thousands of rows
    width = max(len(run.parameterization) for run, _ in runs)
    name = study.file.study.hyperparameter.split(".")[-1]
    axes = runs[0][0].size.axes
    widths = [max(len(axis), *(len(str(getattr(run.size, axis))) for run, _ in runs)) for axis in axes]
    headings = "  ".join(f"{axis:>{columns}}" for axis, columns in zip(axes, widths, strict=True))
    lines = [f"{'run':12}  {'':{width}}  {headings}  {name:>9}  seed   FLOPs"]
    for run, done in runs:
        shape = "  ".join(f"{each:>{columns}}" for each, columns in zip(run.size.axes.values(), widths, strict=True))
        cells = (
            f"{power_of_two(run.value):>9}  {run.seed:4}  {quantity(flops[run.size][1]):>6}{'  done' if done else ''}"
        )
        lines.append(f"{run.directory.path.name}  {run.parameterization:{width}}  {shape}  {cells}")
    console.out("\n".join(lines), highlight=False)

    totals = Table(box=None, pad_edge=False)
    for heading in ("size", "parameters", "runs", "FLOPs a run", "FLOPs"):
        totals.add_column(heading, justify="left" if heading == "size" else "right")
    everything = 0.0
    for size, (parameters, each) in flops.items():
        shares = [run.share for run in study.runs if run.size == size]
        everything += sum(shares) * each
        totals.add_row(str(size), f"{parameters:,}", str(len(shares)), quantity(each), quantity(sum(shares) * each))
    console.print("\n", totals, sep="")
    base = study.file.model.base_size
    if smaller := [str(size) for size in flops if size.width < base.width or size.depth < base.depth]:
        them = smaller[0] if len(smaller) == 1 else f"{len(smaller)} of these sizes"
        larger = f"base width {base.width}, depth {base.depth} is larger than {them}: factors scale down"
        console.print(f"\n{larger}", highlight=False)
    for sentence in expected_drifts(study.file):
        console.print(f"\n{textwrap.fill(sentence, 80)}", highlight=False)
    finished = [(run, done) for run, done in runs if done and done["outcome"] == "completed"]
    num_done = sum(bool(done) for _, done in runs)
    console.print(
        f"\n{len(runs)} run{'s' if len(runs) > 1 else ''} ({num_done} done), {quantity(everything)}FLOPs in all",
        highlight=False,
    )
    jobs = [*describe_packs(study, [study.file.study.hyperparameter]), *describe_jobs(study)]
    console.print("\n".join(jobs), highlight=False)
    if branches := [run for run in study.runs if run.trunk]:
        alone = quantity(sum(flops[run.size][1] for run in study.runs))
        console.print(
            f"a ladder: {len(branches)} of the runs branch off longer ones and train their decay alone; without it "
            f"{alone}FLOPs",
            highlight=False,
        )
    largest = max(each for _, each in flops.values())
    console.print(
        f"{show_times(everything / largest)} times the cost of one run of the largest of these sizes", highlight=False
    )
    if finished:
        known: dict[Size, list[float]] = {}
        for run, done in finished:
            known.setdefault(run.size, []).append(done.get("seconds", 0.0))
        of_size = {size: each for size, (_, each) in flops.items()}
        each_takes = expected_seconds(of_size, known, study.file.train.num_steps)
        hours = sum(each_takes[run.size] for run, _ in runs) / 3600
        console.print(f"about {hours:.2g} hours of training in all, as the runs that are done took", highlight=False)
    if shared := len(study.points) - len(runs):
        console.print(f"{shared} more points need no run: there the parameterizations are the same", highlight=False)
    if study.file.study.adaptive:
        describe_design(study, console)
        return
    if study.file.study.extend:
        rounds = study.file.study.extend
        console.print(
            f"and 2 values more, up to {rounds} times, where the best is on the edge (study.extend)", highlight=False
        )
    if study.file.study.more_seeds:
        rounds = study.file.study.more_seeds
        console.print(f"and 1 seed more, up to {rounds} times, where noise decides (study.more_seeds)", highlight=False)
