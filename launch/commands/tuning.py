"""Commands about several hyperparameters at once: tune them, and verify what was transferred."""

from pathlib import Path
from typing import TYPE_CHECKING

from depthmup.data.errors import UserError
from depthmup.launch.commands.group import (
    add_config_arguments,
    command,
    detachable,
    open_console,
    open_study,
    refuse_detached_elsewhere,
)

if TYPE_CHECKING:
    from depthmup.launch.runs.joint import JointStudy


def walk(study: "JointStudy", detach: bool) -> None:
    """Trains what is left and prints the result; `detach` leaves that to a job."""
    from depthmup.launch import chain

    console = open_console()
    if detach:
        refuse_detached_elsewhere(study)
        chain.advance_study(study, (), console)
    else:
        chain.run_search(study, console)


@command("tune", example="depthmup tune configs/digits_tune.yaml tune.trials=64 --cluster mine")
@add_config_arguments
@detachable
def tune(config: Path, overrides: tuple[str, ...], detach: bool) -> None:
    """Tune several hyperparameters of the proxy at once.

    CONFIG is one run with a section tune: tune.space has a range or a list of values for each hyperparameter, and
    tune.trials says how many of Optuna's suggestions are trained (32). The best ones are trained again with new seeds,
    which alone say which is best: best.yaml is that run. 'depthmup plan' says the cost and trains nothing. The same
    command continues an interrupted search, and prints the result of a finished one.
    """
    from depthmup.launch.runs.search import Search

    search = open_study(config, overrides)
    if not isinstance(search, Search):
        raise UserError(f"{config}: no section tune:, which says what to tune; the recipe digits_tune has one")
    walk(search, detach)


@command(
    "verify",
    example="depthmup verify large.yaml 'verify.space={optimizer.lr: 4, optimizer.weight_decay: 8}' "
    "verify.width=128 verify.depth=6",
)
@add_config_arguments
@detachable
def verify(config: Path, overrides: tuple[str, ...], detach: bool) -> None:
    """Verify that transferred hyperparameters are good at large sizes.

    CONFIG is the file of one run. Beside that, 59 others (verify.runs) are trained: each changes all keys of
    verify.space at once, where 4 means up to a factor of 4 either way. Says whether the file's own values are among the
    best 5 % of that space. All runs have the file's size, or a smaller one (verify.width, verify.depth), and are
    refused where they cost more than one run of the file (verify.budget); 'depthmup plan' says the cost. The same
    command continues, or prints the result.
    """
    from depthmup.launch.runs.verification import Verification

    verification = open_study(config, overrides)
    if not isinstance(verification, Verification):
        raise UserError(
            f"{config}: no section verify:, which says what to perturb: add 'verify.space={{optimizer.lr: 4}}', which "
            "goes from a quarter of the file's rate to four times it"
        )
    walk(verification, detach)
