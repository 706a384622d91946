"""The command line. Commands import what they need when they run, so that `--help` is quick."""

import errno
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from depthmup.data.errors import UserError
from depthmup.data.paths import expand_path
from depthmup.launch import shards
from depthmup.launch.paths import FilePath
from depthmup.launch.shards import new_console
from depthmup.models.errors import ModelError

if TYPE_CHECKING:
    from rich.console import Console

    from depthmup.launch.runs.study import Study
    from depthmup.launch.transfer import Launched
    from depthmup.models.coordinate_check import Axis

EXAMPLES = {
    "transfer": "depthmup transfer configs/digits_resnet.yaml study.directory=/scratch/runs",
    "plan": "depthmup plan configs/digits_resnet.yaml",
    "launch": "depthmup launch configs/digits_resnet.yaml --cluster slurm launch.partition=gpu",
    "retry": "depthmup retry configs/digits_resnet.yaml launch.memory_gb=32",
    "cancel": "depthmup cancel configs/digits_resnet.yaml",
    "status": "depthmup status configs/digits_resnet.yaml",
    "report": "depthmup report configs/digits_resnet.yaml configs/digits_vit.yaml --publish docs/results",
    "limit": "depthmup limit configs/digits_resnet.yaml",
    "converge": "depthmup converge configs/paper/convergence_depth.yaml",
    "scale": "depthmup scale runs/digits_resnet model.width=128 model.depth=27 train.samples=51200",
    "train": "depthmup train configs/digits_resnet.yaml optimizer.lr=2**-5 model.depth=27",
    "check": "depthmup check configs/digits_vit.yaml parameterization.name=completep",
    "export": "depthmup export runs/0123456789ab vit.safetensors",
}


# What keeps a command from writing where it was told to: a folder is another user's, or no folder, or full.
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
NOT_WRITABLE |= {errno.ENOSPC, errno.EDQUOT}


class Commands(click.Group):
    """Lists the commands as they are defined, the main job first, and not by the alphabet."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, context: click.Context) -> Any:
        """Ctrl-C ends a command with one line; click itself says Aborted! and ends 1."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as stopped:
            click.echo(str(stopped) or "Interrupted; the same command continues.", err=True)
            sys.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Tune a small network, train a wide and deep one with the same learning rate.

    CONFIG is a YAML file, or a study's folder; KEY=VALUE overrides a key, as in model.depth=48 optimizer.lr=2**-9.
    """


def command(name: str, **settings: Any) -> Callable[[Callable[..., None]], click.Command]:
    """A command with an example at the end of its help."""
    return cli.command(name, epilog=f"Example: {EXAMPLES[name]}", **settings)


def with_config(function: Callable[..., None]) -> Callable[..., None]:
    """The arguments CONFIG [KEY=VALUE]... and the option --cluster, which is a short form of launch.cluster=..."""

    @click.argument("config", type=FilePath())
    @click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    @click.option("--cluster", help="local, debug, slurm, or a profile: its name, or its file.")
    @functools.wraps(function)
    def wrapped(config: Path, overrides: tuple[str, ...], cluster: str | None, **options: Any) -> None:
        chosen = (f"launch.cluster={cluster}",) if cluster else ()
        function(config=config, overrides=(*overrides, *chosen), **options)

    return wrapped


def open_study(config: Path, overrides: tuple[str, ...]) -> "Study":
    """A study, or one run as a study of one."""
    from depthmup.launch.reading import read_study_or_run
    from depthmup.launch.runs.study import Study

    file = read_study_or_run(config, overrides)
    if file.decay_warning and file.study.hyperparameter != "optimizer.weight_decay":  # which a sweep does not use
        click.echo(f"warning: {file.decay_warning}", err=True)
    return Study(config, file, overrides)


@command("transfer")
@with_config
@click.option("--target", "targets", type=FilePath(), multiple=True, help="Then scale to this YAML, and train it.")
@click.option("--detach", is_flag=True, help="On Slurm: return at once; a job goes on after the runs, to the end.")
def transfer(config: Path, overrides: tuple[str, ...], targets: tuple[Path, ...], detach: bool) -> None:
    """Run a whole study: data, all runs, report; or continue it.

    --target may be given several times.
    """
    from depthmup.launch import chain

    study, console = open_study(config, overrides), new_console()
    for target in targets:
        if not target.exists():
            raise UserError(f"{target}: no such file; it holds the target's sections, as model and train")
        if not target.is_file():
            raise UserError(f"{target}: the target's file is read after the runs: give a file that is there then")
    study.target_files(targets)
    if not detach:
        chain.transfer(study, targets, console)
    elif study.file.launch.cluster != "slurm":
        raise UserError(
            f"--detach leaves a Slurm job, and launch.cluster is {study.file.launch.cluster}: add --cluster"
        )
    else:
        chain.advance_study(study, targets, console)


def print_launched(study: "Study", launched: "Launched", console: "Console") -> None:
    if launched.job_ids:
        console.print(f"{len(launched.runs)} runs submitted: jobs {', '.join(launched.job_ids)}", highlight=False)
    elif launched.slots:
        pids = ", ".join(str(slot.pid) for slot in launched.slots)
        console.print(f"{len(launched.runs)} runs started: processes {pids}", highlight=False)
    elif not launched.runs:
        from depthmup.launch.jobs.states import take

        counts = ", ".join(f"{count} {state}" for state, count in take(study).counts().items())
        console.print(f"Nothing to submit: {counts}.", highlight=False)
    else:  # they were trained in this process
        from depthmup.launch.transfer import unfinished

        if not all(run.done() for run in launched.runs):
            raise unfinished(study)
        console.print(f"{len(launched.runs)} runs trained.", highlight=False)


@command("launch")
@with_config
@click.option("--dry-run", is_flag=True, help="Print the sbatch script and submit nothing.")
def launch_command(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Submit the runs that are not done, and return.

    CONFIG is a study, or one run.
    """
    from depthmup.launch.transfer import grow, launch, prepare_data

    study, console = open_study(config, overrides), new_console()
    if dry_run:
        from depthmup.launch.jobs.submit import dry_run_script
        from depthmup.launch.runs.plan import describe_jobs

        click.echo(dry_run_script(study))
        click.echo("\n".join(f"# {line}" for line in describe_jobs(study)))
        return
    if not study.pending() and not grow(study)[0]:
        console.print(f"All {len(study.runs)} runs are done.")
        return
    prepare_data(study, console)
    print_launched(study, launch(study), console)


@command("retry")
@with_config
def retry(config: Path, overrides: tuple[str, ...]) -> None:
    """Submit again what failed or was lost; says why it did.

    Says too which key may help. Runs that never began are left to 'launch'.
    """
    from depthmup.launch.jobs.states import take
    from depthmup.launch.jobs.status import print_troubles
    from depthmup.launch.transfer import STOPPED, Launched, launch

    study, console = open_study(config, overrides), new_console()
    snapshot = take(study)
    print_troubles(snapshot, console)
    launched = launch(study, STOPPED) if snapshot.of(*STOPPED) else Launched([], [], [])
    print_launched(study, launched, console)


@command("cancel")
@with_config
def cancel_command(config: Path, overrides: tuple[str, ...]) -> None:
    """Stop all jobs of a study; 'launch' continues them."""
    from depthmup.launch.transfer import cancel

    console = new_console()
    job_ids, pids = cancel(open_study(config, overrides))
    stopped = [*(f"job {job_id}" for job_id in job_ids), *(f"process {pid}" for pid in pids)]
    console.print(f"Stopped: {', '.join(stopped)}" if stopped else "Nothing waits or runs.", highlight=False)


@command("plan")
@with_config
def plan(config: Path, overrides: tuple[str, ...]) -> None:
    """Print every run and what it costs; launches nothing."""
    from depthmup.launch.runs.plan import print_plan

    print_plan(open_study(config, overrides), new_console())


@command("status")
@with_config
@click.option("--watch", is_flag=True, help="Show it again every 10 seconds until nothing waits or runs.")
@click.option("--all", "everything", is_flag=True, help="Show every run, not only those that need a look.")
def status(config: Path, overrides: tuple[str, ...], watch: bool, everything: bool) -> None:
    """Show what is done, runs, waits or failed, and why."""
    from depthmup.launch.jobs.status import print_status, watch_status

    study, console = open_study(config, overrides), new_console()
    if watch:
        watch_status(study, console, everything)
    else:
        print_status(study, console, everything)


@command("report")
@with_config
@click.option("--publish", type=FilePath(), help="Also copy JSON and figures to this folder.")
def report(config: Path, overrides: tuple[str, ...], publish: Path | None) -> None:
    """Write and print the table, curves and verdicts so far.

    Further CONFIGs are reported too, and compared on one more page.
    """
    from depthmup.launch.chain import show_report

    changes = tuple(word for word in overrides if "=" in word)
    configs = [config, *(Path(expand_path(word)) for word in overrides if "=" not in word)]
    studies, console = [open_study(path, changes) for path in configs], new_console()
    reports = [show_report(study, console) for study in studies]
    if len(reports) > 1:
        from depthmup.launch.report.overview import print_overview, write_overview

        print_overview(reports, console)
        page = studies[0].file.directory.parent / "overview.html"
        write_overview(reports, page)
        console.print(f"Overview: {page}")
    if publish:
        from depthmup.launch.report.page import publish as copy

        for path in (path for written in reports for path in copy(written, publish)):
            console.print(f"Published: {path}")


@command("converge")
@with_config
def converge_command(config: Path, overrides: tuple[str, ...]) -> None:
    """Fit how fast a finished study nears its limit.

    Takes the runs at the base's optimum: their loss curves and last-layer feature kernels, over width and over depth,
    as distances to the largest size, with fitted exponents beside the theory's. Needs three sizes along an axis and
    three seeds. 'report --publish' copies its figures too.
    """
    from depthmup.launch.report.converge import converge

    console = new_console()
    for path in converge(open_study(config, overrides), console):
        console.print(f"Written: {path}", highlight=False)


@command("limit")
@with_config
@click.option("--lr", type=float, help="The base's learning rate [default: an eighth of the largest stable one].")
def limit(config: Path, overrides: tuple[str, ...], lr: float | None) -> None:
    """Show the limit of a study's rules, and networks nearing it.

    Prints the tangent kernel at each size and in the limit, the largest stable rate and the drift that finite depth
    makes. Then trains residual MLPs under the study's rules, on Gaussian inputs and on its images, and fits how their
    distance to the infinite network falls with width and depth. For norm-free ResNets with one conv a branch, and sgd.
    """
    from depthmup.launch.report.limit import limit_command, refuse_not_covered
    from depthmup.launch.transfer import pack_source

    study, console = open_study(config, overrides), new_console()
    refuse_not_covered(study)  # before the images are packed
    if lr is not None and not 0 < lr < float("inf"):
        raise UserError(f"--lr {lr:g}: give a learning rate above 0")
    pack_source(study.file.data, console)
    for path in limit_command(study, lr, console):
        console.print(f"Written: {path}", highlight=False)


@command("scale")
@with_config
@click.option("--target", type=FilePath(), help="YAML with the target's sections, as model and train.")
@click.option("--out", type=FilePath(), help="File to write [default: NAME_target.yaml in the study's folder].")
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
    """Write the large run's file with the study's best values.

    CONFIG is the study's file, or its folder when it was run with overrides. KEY=VALUE changes the target's keys, and
    study.KEY=VALUE says which study.
    """
    from depthmup.launch.chain import write_scaled
    from depthmup.launch.reading import read_study
    from depthmup.launch.runs.study import Study

    of_study = tuple(override for override in overrides if override.startswith("study."))
    changes = tuple(override for override in overrides if override not in of_study)
    study = Study(config, read_study(config, of_study), of_study)
    study.refuse_overridden()
    path = out or study.target_file
    write_scaled(study, path, target, changes, new_console(), parameterization, scale_batch, force)


@cli.group("cluster")
def cluster() -> None:
    """About this machine's Slurm cluster: probe."""


@cluster.command("probe", epilog="Example: depthmup cluster probe > configs/cluster/mine.yaml")
def probe() -> None:
    """Propose a profile for configs/cluster from what sinfo says."""
    from depthmup.launch.jobs.probe import propose

    click.echo(propose(), nl=False)


@command("train")
@with_config
@click.option("--directory", type=FilePath(), help="The run's directory [default: runs/HASH].")
def train(config: Path, overrides: tuple[str, ...], directory: Path | None) -> None:
    """Train one run in this process, or continue it; packs data.source first where there are no shards.

    Ctrl-C saves a checkpoint. Ends 3 when the loss diverged, 75 when it was stopped.
    """
    from depthmup.launch.reading import read_run
    from depthmup.launch.transfer import pack_source
    from depthmup.train.__main__ import train as train_run
    from depthmup.train.config import run_hash
    from depthmup.train.rundir import RunDirectory

    run_config = read_run(config, overrides)
    pack_source(run_config.data, new_console())
    sys.exit(train_run(run_config, RunDirectory(directory or Path("runs") / run_hash(run_config))))


@command("check")
@with_config
@click.option("--factors", default="1,2,4,8", show_default=True, help="Sizes, as multiples of base width and depth.")
@click.option("--steps", default=8, show_default=True, help="Training steps; slopes are judged after 1 and after all.")
@click.option("--seeds", default=4, show_default=True, help="Seeds; a slope's standard error comes from them.")
@click.option("--batch-size", default=16, show_default=True, help="Images in the one fixed batch.")
@click.option("--axis", type=click.Choice(["width", "depth"]), help="Check this one only [default: both].")
@click.option("--plot", type=FilePath(), help="The plot's file [default: check_*.png with the study].")
def check(
    config: Path,
    overrides: tuple[str, ...],
    factors: str,
    steps: int,
    seeds: int,
    batch_size: int,
    axis: "Axis | None",
    plot: Path | None,
) -> None:
    """Coordinate check: do updates keep their size as the net grows?

    Trains the model on random images at multiples of its base size and prints log-log slopes with their standard
    errors, beside what the limit demands. Ends 1 when a slope is off (!) or too noisy to judge (?). For a large model
    give a small base: model.base_width=64 model.base_depth=3 model.image_size=32.
    """
    from depthmup.launch.check import run_check

    if not run_check(config, overrides, factors, steps, seeds, batch_size, axis, plot, new_console()):
        sys.exit(1)


@command("export")
@click.argument("run", type=FilePath())
@click.argument("out", type=FilePath())
def export(run: Path, out: Path) -> None:
    """Write RUN's weights to OUT for plain timm.

    OUT is a safetensors file for timm.create_model, every multiplier folded in.
    """
    from depthmup.launch.export import export_run, loading_code

    name, arguments = export_run(run, out)
    click.echo(f"{out} is written. In Python:\n\n{loading_code(out, name, arguments)}")


SUMMARIES = {
    shards.pack: "Pack images into WebDataset shards with an index.",
    shards.index: "Index shards that exist already.",
    shards.inspect: "Count and show the images of shards; find the unreadable.",
}
for data_command, summary in SUMMARIES.items():
    data_command.short_help = summary  # its docstring's first sentence is too long for a line
    cli.add_command(data_command)


def main() -> None:
    """The `depthmup` command: 0 on success, 2 with one line on a user's mistake."""
    try:
        cli()
    except (UserError, ModelError) as error:
        click.echo(f"depthmup: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        click.echo(f"depthmup: {error.filename}: cannot write there ({error.strerror})", err=True)
        sys.exit(2)
