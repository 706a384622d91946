"""The command that tunes several hyperparameters at once."""

from pathlib import Path

import click

from depthmup.data.errors import UserError
from depthmup.launch.commands.group import command, open_study, with_config
from depthmup.launch.shards import new_console


@command("tune", example="depthmup tune configs/digits_tune.yaml tune.trials=64 --cluster mine")
@with_config
@click.option("--detach", is_flag=True, help="On Slurm: return at once; a job goes on after each batch, to the end.")
def tune(config: Path, overrides: tuple[str, ...], detach: bool) -> None:
    """Tune several hyperparameters of the proxy at once.

    Trains what Optuna's sampler suggests from tune.space, batch by batch, then the best again with new seeds; prints
    what each hyperparameter did and writes best.yaml. Given again it continues, or prints the result.
    """
    from depthmup.launch import chain
    from depthmup.launch.runs.search import Search

    search, console = open_study(config, overrides), new_console()
    if not isinstance(search, Search):
        raise UserError(f"{config}: no section tune:, which says what to tune; see depthmup tune --help")
    if not detach:
        chain.tune(search, console)
    elif search.file.launch.cluster != "slurm":
        raise UserError(
            f"--detach leaves a Slurm job, and launch.cluster is {search.file.launch.cluster}: add --cluster"
        )
    else:
        chain.advance_study(search, (), console)
