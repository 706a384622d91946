"""Commands about several hyperparameters at once: tune them, and verify what was transferred."""

from pathlib import Path
from typing import TYPE_CHECKING

from depthmup.data.errors import UserError
from depthmup.launch.commands.group import command, detachable, open_study, refuse_detached_elsewhere, with_config
from depthmup.launch.shards import new_console

if TYPE_CHECKING:
    from depthmup.launch.runs.joint import JointStudy


def walk(study: "JointStudy", detach: bool) -> None:
    """Trains what is left and prints the result; `detach` leaves that to a job."""
    from depthmup.launch import chain

    console = new_console()
    if detach:
        refuse_detached_elsewhere(study)
        chain.advance_study(study, (), console)
    else:
        chain.walk(study, console)


@command("tune", example="depthmup tune configs/digits_tune.yaml tune.trials=64 --cluster mine")
@with_config
@detachable
def tune(config: Path, overrides: tuple[str, ...], detach: bool) -> None:
    """Tune several hyperparameters of the proxy at once.

    Trains what Optuna's sampler suggests from tune.space, batch by batch, then the best again with new seeds; prints
    what each hyperparameter did and writes best.yaml. Given again it continues, or prints the result.
    """
    from depthmup.launch.runs.search import Search

    search = open_study(config, overrides)
    if not isinstance(search, Search):
        raise UserError(f"{config}: no section tune:, which says what to tune; see depthmup tune --help")
    walk(search, detach)


@command(
    "verify",
    example="depthmup verify large.yaml 'verify.space={optimizer.lr: 4, optimizer.weight_decay: 8}' "
    "verify.width=128 verify.depth=6",
)
@with_config
@detachable
def verify(config: Path, overrides: tuple[str, ...], detach: bool) -> None:
    """Verify that transferred hyperparameters are good where they went.

    Trains 59 runs (verify.runs) with all keys of verify.space perturbed at once, a factor of 4 either way say, and says
    whether the file's own values are among the best 5 %. At the file's size, or at a smaller one that
    verify.budget pays; 'depthmup plan' says the cost. Given again it continues, or prints the result.
    """
    from depthmup.launch.runs.verification import Verification

    verification = open_study(config, overrides)
    if not isinstance(verification, Verification):
        raise UserError(
            f"{config}: no section verify:, which says what to perturb: add 'verify.space={{optimizer.lr: 4}}', from a "
            "quarter of the file's rate to four times it"
        )
    walk(verification, detach)
