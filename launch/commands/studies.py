"""Commands about a whole study: run it, look at it, report it, scale from it."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from depthmup.data.errors import UserError
from depthmup.data.paths import expand_path
from depthmup.launch.commands.group import (
    add_config_arguments,
    command,
    detachable,
    open_console,
    open_study,
    read_file,
    refuse_detached_elsewhere,
    results_out,
)
from depthmup.launch.paths import FilePath, Location

if TYPE_CHECKING:
    from rich.console import Console

    from depthmup.launch.runs.study import Study
    from depthmup.launch.transfer import Launched


def complete_network(context: click.Context, parameter: click.Parameter, text: str) -> list[CompletionItem]:
    """Names that begin so, or else the shell's completion of a file's."""
    from depthmup.launch.new_network import PROXIES

    return [CompletionItem(name) for name in PROXIES if name.startswith(text)] or [CompletionItem(text, type="file")]


@command("new", example="depthmup new flowers --source ~/flowers --target width=768,depth=24")
@click.argument("name")
@click.option(
    "--network",
    "--family",
    "network",
    shell_complete=complete_network,
    default="vit",
    show_default=True,
    help="vit, conv_resnet, resnet, a name of timm's as convnext_atto, or your own: FILE.py:FUNCTION.",
)
@click.option(
    "--source",
    type=Location(),
    default="sklearn:digits",
    show_default=True,
    help="A folder or tar of class folders, or a folder of indexed shards.",
)
@click.option(
    "--target", help="Size the proxy for this network: width=768,depth=24; samples=1e8 and batch=1024 may follow."
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.01,
    show_default=True,
    help="Of the target's FLOPs, that tuning may cost.",
)
@click.option("--base", help="The proxy's size, as width=32,depth=2  [default: a small one that fits].")
def new(name: str, network: str, source: str, target: str | None, share: float, base: str | None) -> None:
    """Write NAME.yaml, a commented study to start from.

    It is fitted to the images of --source: their classes, size and colours. With --target it begins with a search of
    several hyperparameters, all runs are as long as --share pays for, and NAME_target.yaml is written, too.

    A network of your own is a function (width, depth) of one file, which gives a torch.nn.Module: what grows, what
    repeats and where branches end is found by looking.
    """
    from depthmup.launch.new import write_new_study

    click.echo("\n".join(write_new_study(name, network, source, target, share, base)))


@command("transfer", example="depthmup transfer configs/digits_resnet.yaml study.directory=/scratch/runs")
@add_config_arguments
@click.option(
    "--target",
    "targets",
    type=FilePath(),
    multiple=True,
    help="After the study, scale to the target of this YAML file, and train it.",
)
@click.option("--tune", is_flag=True, help="First tune the base, as the section tune of CONFIG says.")
@detachable
def transfer(config: Path, overrides: tuple[str, ...], targets: tuple[Path, ...], tune: bool, detach: bool) -> None:
    """Run a whole study: data, all runs, report; or continue it.

    --target may be given several times. With --tune the command does all of it: tune at the base, confirm over sizes,
    forecast, scale, train the target, and judge the forecast.
    """
    from depthmup.launch import chain
    from depthmup.launch.report.collect import check_swept
    from depthmup.launch.runs.opened import open_planned
    from depthmup.launch.runs.search import Search
    from depthmup.launch.runs.tuned import is_over_sizes, keep_study

    file, console = read_file(config, overrides), open_console()
    study = open_planned(config, file, overrides)
    if file.tune and is_over_sizes(file) and not tune:
        raise UserError(f"{config} has a section tune: add --tune, which tunes the base first, or take it out")
    if not tune:
        check_swept(study)
    elif not isinstance(study, Search):
        raise UserError(f"{config}: no section tune:, which says what --tune is to tune; see docs/tuning.md")
    for target in targets:
        if not target.exists():
            raise UserError(f"{target}: no such file; it holds the target's sections, as model and train")
        if not target.is_file():
            raise UserError(f"{target}: the target's file is read after the runs: give a file that still exists then")
    study.target_files(targets)
    if isinstance(study, Search):
        keep_study(study, file)
    if detach:
        refuse_detached_elsewhere(study)
        chain.advance_study(study, targets, console, after=tune)
    else:
        tuned = chain.run_search(study, console) if isinstance(study, Search) else study
        assert tuned  # its study was kept
        chain.transfer(tuned, targets, console)


def print_launched(study: "Study", launched: "Launched", console: "Console") -> None:
    if launched.job_ids:
        console.print(launched.describe_jobs(), highlight=False)
        if launched.left:
            again = f"To submit those once jobs have ended: {study.command('launch')}"
            console.print(again, highlight=False, soft_wrap=True)
    elif launched.left:
        console.print(f"Slurm has no place for {launched.left} runs while jobs of this study wait or run.")
    elif launched.slots:
        pids = ", ".join(str(slot.pid) for slot in launched.slots)
        console.print(f"{len(launched.runs)} runs started: processes {pids}", highlight=False)
    elif not launched.runs:
        from depthmup.launch.jobs.states import take_snapshot

        counts = ", ".join(f"{count} {state}" for state, count in take_snapshot(study).counts().items())
        console.print(f"Nothing to submit: {counts}.", highlight=False)
    else:  # they were trained in this process
        from depthmup.launch.transfer import count_unfinished

        if not all(run.done() for run in launched.runs):
            raise count_unfinished(study)
        console.print(f"{len(launched.runs)} runs trained.", highlight=False)


@command("launch", example="depthmup launch configs/digits_resnet.yaml --cluster slurm launch.partition=gpu")
@add_config_arguments
@click.option("--dry-run", is_flag=True, help="Print the sbatch script and submit nothing.")
def launch_command(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Submit the runs that are not done, and return.

    CONFIG is a study, or one run.
    """
    from depthmup.launch.prepare import prepare_data
    from depthmup.launch.transfer import grow, launch

    study, console = open_study(config, overrides), open_console()
    if dry_run:
        from depthmup.launch.jobs.submit import write_dry_run_script
        from depthmup.launch.runs.plan import describe_jobs

        click.echo(write_dry_run_script(study))
        click.echo("\n".join(f"# {line}" for line in describe_jobs(study)))
        return
    if not study.pending() and not grow(study)[0]:
        console.print(f"All {len(study.runs)} runs are done.")
        return
    prepare_data(study, console)
    print_launched(study, launch(study), console)


@command("retry", example="depthmup retry configs/digits_resnet.yaml launch.memory_gb=32")
@add_config_arguments
def retry(config: Path, overrides: tuple[str, ...]) -> None:
    """Submit failed and lost runs again, and say why they failed.

    It also says which key may help. For runs that never began, use 'launch'.
    """
    from depthmup.launch.jobs.states import take_snapshot
    from depthmup.launch.jobs.status import print_troubles
    from depthmup.launch.prepare import prepare_data
    from depthmup.launch.transfer import STOPPED, Launched, launch

    study, console = open_study(config, overrides), open_console()
    snapshot, launched = take_snapshot(study), Launched([], [], [])
    print_troubles(snapshot, console)
    if snapshot.of(*STOPPED):
        prepare_data(study, console)
        launched = launch(study, STOPPED)
    print_launched(study, launched, console)


@command("cancel", example="depthmup cancel configs/digits_resnet.yaml")
@add_config_arguments
def cancel_command(config: Path, overrides: tuple[str, ...]) -> None:
    """Stop all jobs of a study and of its targets.

    It also stops the job that continues after the runs. 'launch', or the same 'transfer', resumes them.
    """
    from depthmup.launch.jobs.cancel import cancel_path

    study, console = open_study(config, overrides), open_console()
    nothing, elsewhere = True, set[str]()
    for stopped in cancel_path(study):
        of_what = "" if stopped.study is study else f", of the target {stopped.study.file.directory}"
        if str(stopped):
            console.print(f"Stopped{of_what}: {stopped}", highlight=False, markup=False, soft_wrap=True)
            nothing = False
        elsewhere.update(stopped.elsewhere)
    if elsewhere:
        hosts = ", ".join(sorted(elsewhere))
        raise UserError(f"processes on {hosts} train this study: give the same command there, too")
    if nothing:
        console.print("Nothing waits or runs.", highlight=False)


@command("plan", example="depthmup plan configs/digits_resnet.yaml")
@add_config_arguments
@click.option("--target", "targets", type=FilePath(), multiple=True, help="Compare with the cost of this target.")
def plan(config: Path, overrides: tuple[str, ...], targets: tuple[Path, ...]) -> None:
    """Print every run and its cost; launches nothing."""
    from depthmup.launch.path_cost import count_path
    from depthmup.launch.runs.opened import open_planned
    from depthmup.launch.runs.plan import print_plan
    from depthmup.launch.scale import read_changes
    from depthmup.launch.wording import wrap_line

    file, console = read_file(config, overrides), open_console()
    print_plan(open_planned(config, file, overrides), console)
    for target in targets:
        cost = count_path(config, file, read_changes(target, ()))
        console.print(wrap_line(f"{target}: {cost}"), highlight=False, markup=False)


@command("status", example="depthmup status configs/digits_resnet.yaml")
@add_config_arguments
@click.option("--watch", is_flag=True, help="Show it again every 10 seconds until nothing waits or runs.")
@click.option("--all", "everything", is_flag=True, help="Show every run, not only those that need attention.")
def status(config: Path, overrides: tuple[str, ...], watch: bool, everything: bool) -> None:
    """Show which runs are done, running, waiting or failed, and why."""
    from depthmup.launch.jobs.status import print_status, watch_status

    study, console = open_study(config, overrides), open_console()
    if watch:
        watch_status(study, console, everything)
    else:
        print_status(study, console, everything)


@command("report", example="depthmup report configs/digits_resnet.yaml configs/digits_vit.yaml --publish docs/results")
@add_config_arguments
@results_out
@click.option("--publish", type=FilePath(), help="Also copy JSON and figures to this folder.")
@click.option("--watch", is_flag=True, help="Write it again every 10 seconds until nothing waits or runs.")
def report(config: Path, overrides: tuple[str, ...], out: Path | None, publish: Path | None, watch: bool) -> None:
    """Write and print the table, curves and verdicts so far.

    Further CONFIGs are reported too, and compared on one more page. Of a search or a verification, what it found once
    it has ended.
    """
    from depthmup.launch.chain import show_report, watch_report
    from depthmup.launch.report.collect import check_swept
    from depthmup.launch.report.joint import publish_joint, show_joint
    from depthmup.launch.report.place import choose_results_folder
    from depthmup.launch.runs.joint import JointStudy

    changes = tuple(word for word in overrides if "=" in word)
    configs = [config, *(Path(expand_path(word)) for word in overrides if "=" not in word)]
    studies, console = [open_study(path, changes) for path in configs], open_console()
    joint = [] if watch else [study for study in studies if isinstance(study, JointStudy)]
    studies = [study for study in studies if study not in joint]
    for study in studies:
        check_swept(study)
    for found in joint:
        show_joint(found, console, out)
    if watch:
        watch_report(studies, console, out)
        studies = [open_study(path, changes) for path in configs]  # their grids may have grown
    reports = [show_report(study, console, out) for study in studies]
    if len(reports) > 1:
        from depthmup.launch.report.overview import print_overview, write_overview
        from depthmup.launch.report.record import make_told_record

        records = [make_told_record(report) for report in reports]
        print_overview(records, console)
        pages = [choose_results_folder(study, out) / "report.html" for study in studies]
        page = pages[0].parent.parent / "overview.html"
        write_overview(records, pages, page)
        console.print(f"Overview: {page}")
    if publish:
        from depthmup.launch.report.page import publish as copy

        copied = [path for found in joint for path in publish_joint(found, choose_results_folder(found, out), publish)]
        for written in reports:
            copied += copy(written, choose_results_folder(written.study, out), publish)
        for path in copied:
            console.print(f"Published: {path}")


@command("scale", example="depthmup scale runs/digits_resnet model.width=128 model.depth=27 train.samples=51200")
@add_config_arguments
@click.option("--target", type=FilePath(), help="YAML with the target's sections, as model and train.")
@click.option("--out", type=FilePath(), help="File to write [default: NAME_target.yaml in the study's folder].")
@click.option("--parameterization", help="Parameterization to transfer [default: the best one that transfers].")
@click.option("--scale-batch", is_flag=True, help="Also scale for batch and samples that no study measured.")
@click.option("--force", is_flag=True, help="Use the value of an inconclusive study anyway.")
def scale_command(
    config: Path,
    overrides: tuple[str, ...],
    target: Path | None,
    out: Path | None,
    parameterization: str | None,
    scale_batch: bool,
    force: bool,
) -> None:
    """Write the large run's file with the study's best values.

    CONFIG is the study's file, or its folder when it was run with overrides. KEY=VALUE changes the target's keys, and
    study.KEY=VALUE selects the study.
    """
    from depthmup.launch.chain import write_scaled
    from depthmup.launch.reading import read_study
    from depthmup.launch.runs.study import Study
    from depthmup.launch.runs.written import refuse_overridden

    of_study = tuple(override for override in overrides if override.startswith("study."))
    changes = tuple(override for override in overrides if override not in of_study)
    study = Study(config, read_study(config, of_study), of_study)
    refuse_overridden(study.path, study.file)
    path = out or study.target_file
    write_scaled(study, path, target, changes, open_console(), parameterization, scale_batch, force)
