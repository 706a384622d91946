"""The command line. Commands import what they need when they run, so that `--help` is quick."""

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

    from launch.study import Study

EXAMPLES = {
    "transfer": "depthmup transfer configs/digits_resnet.yaml study.directory=/scratch/runs",
    "plan": "depthmup plan configs/digits_resnet.yaml",
    "launch": "depthmup launch configs/digits_resnet.yaml launch.cluster=slurm launch.partition=gpu",
    "status": "depthmup status configs/digits_resnet.yaml",
    "report": "depthmup report configs/digits_resnet.yaml",
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


config_arguments = [
    click.argument("config", type=click.Path(path_type=Path)),
    click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
]


def with_config(function: Callable[..., None]) -> Callable[..., None]:
    for argument in reversed(config_arguments):
        function = argument(function)
    return function


def new_console() -> "Console":
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty())


def open_study(config: Path, overrides: tuple[str, ...]) -> "Study":
    from launch.config import read_study
    from launch.study import Study

    return Study(config, read_study(config, overrides))


def show_report(study: "Study", console: "Console") -> None:
    from launch.report import collect, print_report, write_report

    report = collect(study)
    if not report.results:
        raise UserError(f"no run of {study.path} is finished: start them with 'depthmup transfer {study.path}'")
    write_report(report)
    print_report(report, console)
    console.print(f"Report: {study.file.directory / 'report.html'} (also .csv and .json)")


@command("transfer")
@with_config
def transfer(config: Path, overrides: tuple[str, ...]) -> None:
    """Run a whole study: pack data, train every run, report. Continues what is there."""
    from launch.transfer import launch, prepare_data, wait

    study, console = open_study(config, overrides), new_console()
    pending = study.pending()
    if pending:
        prepare_data(study, console)
        jobs = launch(study, pending)
        try:
            wait(study, jobs, console)
        except KeyboardInterrupt:
            if study.file.launch.cluster != "slurm":
                for job in jobs:
                    job.cancel()
            console.print(f"\nInterrupted. Run 'depthmup transfer {config}' again to continue.")
            sys.exit(130)
    show_report(study, console)


@command("launch")
@with_config
def launch_command(config: Path, overrides: tuple[str, ...]) -> None:
    """Submit the runs of a study that are not done, print their job ids, and return."""
    from launch.transfer import launch, prepare_data

    study, console = open_study(config, overrides), new_console()
    pending = study.pending()
    if not pending:
        console.print(f"All {len(study.runs)} runs are done.")
        return
    prepare_data(study, console)
    jobs = launch(study, pending)
    console.print(f"{len(pending)} runs submitted: jobs {', '.join(job.job_id for job in jobs)}", highlight=False)


@command("plan")
@with_config
def plan(config: Path, overrides: tuple[str, ...]) -> None:
    """Print every run with parameters and FLOPs, and the total. Launches nothing."""
    from launch.plan import print_plan

    print_plan(open_study(config, overrides), new_console())


@command("status")
@with_config
def status(config: Path, overrides: tuple[str, ...]) -> None:
    """Show which runs are done, running, waiting or failed, with the last loss and error."""
    from launch.status import print_status

    print_status(open_study(config, overrides), new_console())


@command("report")
@with_config
def report(config: Path, overrides: tuple[str, ...]) -> None:
    """Write the HTML page, CSV and JSON of what is finished, and print table and verdicts."""
    show_report(open_study(config, overrides), new_console())


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
