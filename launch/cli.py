"""The command line. Commands import what they need when they run, so that `--help` is quick."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data.errors import UserError
from launch import shards
from models.errors import ModelError

if TYPE_CHECKING:
    from rich.console import Console

    from launch.report import Report
    from launch.study import Study
    from launch.transfer import Launched

EXAMPLES = {
    "transfer": "depthmup transfer configs/digits_resnet.yaml study.directory=/scratch/runs",
    "plan": "depthmup plan configs/digits_resnet.yaml",
    "launch": "depthmup launch configs/digits_resnet.yaml --cluster slurm launch.partition=gpu",
    "retry": "depthmup retry configs/digits_resnet.yaml launch.memory_gb=32",
    "cancel": "depthmup cancel configs/digits_resnet.yaml",
    "status": "depthmup status configs/digits_resnet.yaml",
    "report": "depthmup report configs/digits_resnet.yaml configs/digits_vit.yaml --publish docs/results",
    "scale": "depthmup scale configs/digits_resnet.yaml model.width=128 model.depth=27 train.samples=51200",
    "train": "depthmup train configs/digits_resnet.yaml optimizer.lr=2**-5 model.depth=27",
    "check": "depthmup check configs/digits_vit.yaml parameterization.name=completep",
    "export": "depthmup export runs/0123456789ab vit.safetensors",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Tune a small network, train a wide and deep one with the same learning rate.

    CONFIG is a YAML file; KEY=VALUE overrides one of its keys, as in model.depth=48 optimizer.lr=2**-9.
    """


def command(name: str, **settings: Any) -> Callable[[Callable[..., None]], click.Command]:
    """A command with an example at the end of its help."""
    return cli.command(name, epilog=f"Example: {EXAMPLES[name]}", **settings)


def with_config(function: Callable[..., None]) -> Callable[..., None]:
    """The arguments CONFIG [KEY=VALUE]... and the option --cluster, which is a short form of launch.cluster=..."""

    @click.argument("config", type=click.Path(path_type=Path))
    @click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    @click.option("--cluster", help="local, debug, slurm, or the name of a profile in configs/cluster.")
    @functools.wraps(function)
    def wrapped(config: Path, overrides: tuple[str, ...], cluster: str | None, **options: Any) -> None:
        chosen = (f"launch.cluster={cluster}",) if cluster else ()
        function(config=config, overrides=(*overrides, *chosen), **options)

    return wrapped


def new_console() -> "Console":
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty())


def open_study(config: Path, overrides: tuple[str, ...]) -> "Study":
    """A study, or one run as a study of one."""
    from launch.config import read_study_or_run
    from launch.study import Study

    return Study(config, read_study_or_run(config, overrides))


def show_report(study: "Study", console: "Console") -> "Report":
    from launch.page import write_report
    from launch.report import collect
    from launch.tables import print_report

    report = collect(study)
    if not report.results:
        raise UserError(f"no run of {study.path} is finished: start them with 'depthmup transfer {study.path}'")
    write_report(report)
    print_report(report, console)
    console.print(f"Report: {study.file.directory / 'report.html'} (also .csv and .json)")
    return report


def finish(study: "Study", console: "Console") -> None:
    """Everything up to the last run: data, runs, and rounds of more values or seeds where a verdict needs them."""
    from launch.transfer import grow, launch, prepare_data, wait

    while study.pending():
        prepare_data(study, console)
        launched = launch(study)
        try:
            wait(study, launched, console)
        except KeyboardInterrupt:
            for job in launched.jobs:
                job.cancel()
            console.print(f"\nInterrupted. Run 'depthmup transfer {study.path}' again to continue.")
            sys.exit(130)
        if added := grow(study):
            console.print(f"{added} runs more, to settle what is open (study.extend, study.more_seeds)")


@command("transfer")
@with_config
@click.option("--target", type=click.Path(path_type=Path), help="Then scale to this target's YAML, and train it.")
def transfer(config: Path, overrides: tuple[str, ...], target: Path | None) -> None:
    """Run a whole study: pack data, train every run, report. Continues what is there."""
    study, console = open_study(config, overrides), new_console()
    finish(study, console)
    show_report(study, console)
    if target:
        scaled = study.file.directory / f"{target.stem}.yaml"
        write_scaled(study, scaled, target, (), console)
        large = open_study(scaled, (f"study.directory={study.file.directory}",))
        finish(large, console)
        done = large.runs[0].directory.done() or {}
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in done.items() if isinstance(value, int | float))
        console.print(f"Target {done['outcome']}: {numbers} ({large.runs[0].directory.path})", highlight=False)


def print_launched(study: "Study", launched: "Launched", console: "Console") -> None:
    if launched.job_ids:
        console.print(f"{len(launched.runs)} runs submitted: jobs {', '.join(launched.job_ids)}", highlight=False)
    elif launched.jobs:
        pids = ", ".join(job.job_id for job in launched.jobs)
        console.print(f"{len(launched.runs)} runs started: processes {pids}", highlight=False)
    else:
        left = len(study.pending())
        console.print(
            f"Nothing to submit: {len(study.runs) - left} runs are done, {left} wait or run.", highlight=False
        )


@command("launch")
@with_config
@click.option("--dry-run", is_flag=True, help="Print the sbatch script and submit nothing.")
def launch_command(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Submit the runs that are not done, print their job ids, and return. CONFIG: a study, or one run."""
    from launch.transfer import grow, launch, prepare_data

    study, console = open_study(config, overrides), new_console()
    if dry_run:
        from launch.submit import dry_run_script

        click.echo(dry_run_script(study))
        return
    if not study.pending() and not grow(study):
        console.print(f"All {len(study.runs)} runs are done.")
        return
    prepare_data(study, console)
    print_launched(study, launch(study), console)


@command("retry")
@with_config
def retry(config: Path, overrides: tuple[str, ...]) -> None:
    """Submit again only what failed or was lost; says why it did, and which key may help."""
    from launch.states import take
    from launch.status import print_troubles
    from launch.transfer import launch

    study, console = open_study(config, overrides), new_console()
    print_troubles(take(study), console)
    print_launched(study, launch(study, only=("failed", "lost")), console)


@command("cancel")
@with_config
def cancel_command(config: Path, overrides: tuple[str, ...]) -> None:
    """Stop all jobs of a study. Runs keep their checkpoints; 'launch' continues them."""
    from launch.transfer import cancel

    console = new_console()
    job_ids, pids = cancel(open_study(config, overrides))
    stopped = [*(f"job {job_id}" for job_id in job_ids), *(f"process {pid}" for pid in pids)]
    console.print(f"Stopped: {', '.join(stopped)}" if stopped else "Nothing waits or runs.", highlight=False)


@command("plan")
@with_config
def plan(config: Path, overrides: tuple[str, ...]) -> None:
    """Print every run with parameters and FLOPs, and the total. Launches nothing."""
    from launch.plan import print_plan

    print_plan(open_study(config, overrides), new_console())


@command("status")
@with_config
@click.option("--watch", is_flag=True, help="Show it again every 10 seconds until nothing waits or runs.")
@click.option("--all", "everything", is_flag=True, help="Show every run, not only those that need a look.")
def status(config: Path, overrides: tuple[str, ...], watch: bool, everything: bool) -> None:
    """Show which runs are done, running, waiting or failed, with the last loss and error."""
    from launch.status import print_status, watch_status

    study, console = open_study(config, overrides), new_console()
    if watch:
        watch_status(study, console, everything)
    else:
        print_status(study, console, everything)


@command("report")
@with_config
@click.option("--publish", type=click.Path(path_type=Path), help="Also copy JSON and figures to this folder.")
def report(config: Path, overrides: tuple[str, ...], publish: Path | None) -> None:
    """Write the HTML page, CSV and JSON of what is finished, and print table and verdicts.

    Further CONFIGs are reported too, and compared on one more page.
    """
    changes = tuple(word for word in overrides if "=" in word)
    configs = [config, *(Path(word) for word in overrides if "=" not in word)]
    studies, console = [open_study(path, changes) for path in configs], new_console()
    reports = [show_report(study, console) for study in studies]
    if len(reports) > 1:
        from launch.overview import print_overview, write_overview

        print_overview(reports, console)
        page = studies[0].file.directory.parent / "overview.html"
        write_overview(reports, page)
        console.print(f"Overview: {page}")
    if publish:
        from launch.page import publish as copy

        for path in (path for written in reports for path in copy(written, publish)):
            console.print(f"Published: {path}")


@command("scale")
@with_config
@click.option("--target", type=click.Path(path_type=Path), help="YAML with the target's sections, as model and train.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write [default: CONFIG's name + _target.yaml].")
@click.option("--parameterization", help="Which one to transfer [default: the best one that transfers].")
@click.option("--scale-batch", is_flag=True, help="Scale AdamW for the target's batch and samples too.")
@click.option("--force", is_flag=True, help="Use an inconclusive study all the same.")
def scale_command(
    config: Path,
    overrides: tuple[str, ...],
    target: Path | None,
    out: Path | None,
    parameterization: str | None,
    scale_batch: bool,
    force: bool,
) -> None:
    """Write the large run's configuration with the study's hyperparameters. KEY=VALUE changes the target's keys."""
    from launch.config import read_study
    from launch.study import Study

    changes = [o for o in overrides if not o.startswith(("study.directory=", "study.name="))]
    study = Study(config, read_study(config, tuple(o for o in overrides if o not in changes)))
    console = new_console()
    path = out or config.with_name(f"{config.stem}_target.yaml")
    write_scaled(study, path, target, tuple(changes), console, parameterization, scale_batch, force)


def write_scaled(
    study: "Study",
    path: Path,
    target: Path | None,
    changes: tuple[str, ...],
    console: "Console",
    parameterization: str | None = None,
    scale_batch: bool = False,
    force: bool = False,
) -> None:
    from launch.report import collect
    from launch.scale import read_changes, scale, write_target

    scaled = scale(collect(study), read_changes(target, changes), parameterization, scale_batch, force)
    write_target(scaled, path)
    for fact in scaled.facts:
        console.print(fact, highlight=False)
    console.print(f"Written: {path}. Start it with: depthmup launch {path}", highlight=False)


@cli.group("cluster")
def cluster() -> None:
    """About the Slurm cluster that this machine belongs to."""


@cluster.command("probe", epilog="Example: depthmup cluster probe > configs/cluster/mine.yaml")
def probe() -> None:
    """Propose a profile for configs/cluster from what sinfo says."""
    from launch.probe import propose

    click.echo(propose(), nl=False)


@command("train")
@with_config
@click.option("--directory", type=click.Path(path_type=Path), help="The run's directory [default: runs/HASH].")
def train(config: Path, overrides: tuple[str, ...], directory: Path | None) -> None:
    """Train one run in this process. Continues it when it was interrupted."""
    from launch.config import read_run
    from train.config import run_hash

    run_config = read_run(config, overrides)
    path = directory or Path("runs") / run_hash(run_config)
    from train.loop import run

    result = run(run_config, path)
    summary = ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, int | float))
    click.echo(f"{result['outcome']}: {summary} ({path})")
    if result["outcome"] == "diverged":
        sys.exit(1)


@command("check")
@with_config
@click.option("--factors", default="1,2,4,8", show_default=True, help="Sizes, as multiples of base width and depth.")
@click.option("--steps", default=8, show_default=True, help="Training steps; slopes are judged after 1 and after all.")
@click.option("--seeds", default=2, show_default=True, help="Seeds that each point is averaged over.")
@click.option("--batch-size", default=16, show_default=True, help="Images in the one fixed batch.")
@click.option(
    "--plot", type=click.Path(path_type=Path), default="check.png", show_default=True, help="The plot's file."
)
def check(
    config: Path, overrides: tuple[str, ...], factors: str, steps: int, seeds: int, batch_size: int, plot: Path
) -> None:
    """Coordinate check: do activations and updates keep their size over width and depth? Ends 1 when a slope is off.

    Uses random images. For a large model give a small base: model.base_width=64 model.image_size=32.
    """
    from launch.check import run_check

    if not run_check(config, overrides, factors, steps, seeds, batch_size, plot, new_console()):
        sys.exit(1)


@command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def export(run: Path, out: Path) -> None:
    """Write RUN's weights to OUT (safetensors) for timm.create_model, every multiplier folded in."""
    from launch.export import export_run

    name, arguments = export_run(run, out)
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    click.echo(f"{out}: load it into timm.create_model({name!r}{given})")


for data_command in (shards.pack, shards.index, shards.inspect):
    cli.add_command(data_command)


def main() -> None:
    """The `depthmup` command: 0 on success, 2 with one line on a user's mistake."""
    try:
        cli()
    except (UserError, ModelError) as error:
        click.echo(f"depthmup: {error}", err=True)
        sys.exit(2)
