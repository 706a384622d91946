"""Commands about one run or one network, and about the cluster."""

import sys
from pathlib import Path
from typing import Any

import click

from depthmup.launch.commands.group import add_config_arguments, command, open_console
from depthmup.launch.paths import FilePath


@command("train", example="depthmup train configs/digits_resnet.yaml optimizer.lr=2**-5 model.depth=27")
@add_config_arguments
@click.option("--directory", type=FilePath(), help="The run's directory [default: runs/HASH].")
def train(config: Path, overrides: tuple[str, ...], directory: Path | None) -> None:
    """Train one run in this process, or continue it.

    Packs data.source first where there are no shards. Ctrl-C saves a checkpoint. The exit status is 3 when the loss
    diverged, and 75 when the run was stopped.
    """
    from depthmup.launch.prepare import pack_source
    from depthmup.launch.reading import read_run
    from depthmup.train.__main__ import train as train_run
    from depthmup.train.config import run_hash
    from depthmup.train.rundir import RunDirectory

    run_config = read_run(config, overrides)
    pack_source(run_config.data, open_console())
    sys.exit(train_run(run_config, RunDirectory(directory or Path("runs") / run_hash(run_config))))


@command("check", example="depthmup check configs/digits_vit.yaml parameterization.name=completep")
@add_config_arguments
@click.option("--factors", default="1,2,4,8", show_default=True, help="Sizes, as multiples of base width and depth.")
@click.option("--steps", default=8, show_default=True, help="Training steps; slopes are judged after 1 and after all.")
@click.option("--seeds", default=4, show_default=True, help="Seeds; a slope's standard error comes from them.")
@click.option("--batch-size", default=16, show_default=True, help="Images in the one fixed batch.")
@click.option("--axis", type=click.Choice(["width", "depth", "num_experts", "mlp_ratio"]), help="Check only this axis.")
@click.option("--inside", is_flag=True, help="Also judge each layer inside residual branches.")
@click.option("--plot", type=FilePath(), help="The plot's file [default: check_*.png with the study].")
def check(**options: Any) -> None:
    """Coordinate check: do updates keep their size with width and depth?

    Trains the model on random images at multiples of its base size and prints log-log slopes with their standard
    errors, beside the slopes of the limit. Exits with status 1 when a slope is off (!) or too noisy to judge (?). Of a
    study it checks the first parameterization with rules of depth; parameterization.name=mup names another. For a
    large model give a small base: model.base_width=64 model.base_depth=3 model.image_size=32.
    """
    from depthmup.launch.check import run_check

    if not run_check(**options, console=open_console()):
        sys.exit(1)


@command("export", example="depthmup export runs/0123456789ab vit.safetensors")
@click.argument("run", type=FilePath())
@click.argument("out", type=FilePath())
def export(run: Path, out: Path) -> None:
    """Write RUN's weights to OUT for the plain network.

    OUT is a file NAME.safetensors for timm.create_model, every multiplier folded in; or a folder in the layout of
    Hugging Face, with config.json, for timm.create_model('local-dir:OUT') and for an upload.
    """
    from depthmup.launch.export import export_run

    click.echo(f"{out} is written. In Python:\n\n{export_run(run, out).loading_code(out)}")


@click.group("cluster")
def cluster() -> None:
    """Look at this machine's Slurm cluster."""


@cluster.command("probe", epilog="Example: mkdir -p cluster && depthmup cluster probe > cluster/mine.yaml")
def probe() -> None:
    """Propose a profile from what sinfo says; --cluster finds it by its name in cluster/ or configs/cluster."""
    from depthmup.launch.jobs.probe import propose_profile

    click.echo(propose_profile(), nl=False)


@command("completion", example='eval "$(depthmup completion bash)"')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script with which a shell completes this command.

    Put the example's line into ~/.bashrc (with zsh into ~/.zshrc) to have it in every session. In fish: depthmup
    completion fish | source.
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made
    program = click.get_current_context().find_root().command
    click.echo(made(program, {}, "depthmup", "_DEPTHMUP_COMPLETE").source())


@command("doctor", example="depthmup doctor --directory /scratch/runs")
@click.option(
    "--directory", type=FilePath(), default="runs", show_default=True, help="Where studies are kept (study.directory)."
)
def doctor(directory: Path) -> None:
    """Say what this machine has, what is missing, and what to do.

    Looks at versions, GPUs, /dev/shm, the studies' folder and its locks, Slurm and the W&B key. Exits with status 1
    when something would keep runs from starting.
    """
    from depthmup.launch.doctor import examine

    if not examine(directory, open_console()):
        sys.exit(1)
