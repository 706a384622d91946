"""Commands about the theory's limit."""

from pathlib import Path

import click

from depthmup.data.errors import UserError
from depthmup.launch.commands.group import add_config_arguments, command, open_console, open_study, results_out


@command("converge", example="depthmup converge configs/paper/convergence_depth.yaml")
@add_config_arguments
@results_out
def converge_command(config: Path, overrides: tuple[str, ...], out: Path | None) -> None:
    """Fit how fast a finished study approaches its limit.

    Compares the runs at the base's optimum with those of the largest size: the distances of loss curves and last-layer
    feature kernels over width and over depth, with fitted exponents beside the theory's. Needs three sizes along an
    axis and three seeds. 'report --publish' copies its figures too.
    """
    from depthmup.launch.report.converge import converge

    console = open_console()
    for path in converge(open_study(config, overrides), out, console):
        console.print(f"Written: {path}", highlight=False)


@command("exponents", example="depthmup exponents configs/paper/exponents.yaml --own")
@add_config_arguments
@click.option("--own", is_flag=True, help="Use each size's own best value that ran [default: the base's].")
@results_out
def exponents_command(config: Path, overrides: tuple[str, ...], own: bool, out: Path | None) -> None:
    """Fit how trained weights of a finished study change with depth.

    Takes the weights in residual branches, at the start, trained, and their change: norms, increments from block to
    block and their sums, with fitted exponents of depth, and whether layers become an ODE, an SDE or neither. Needs
    three depths at the base's width. 'report --publish' copies its figure and table too.
    """
    from depthmup.launch.report.exponents import show_exponents

    console = open_console()
    for path in show_exponents(open_study(config, overrides), own, out, console):
        console.print(f"Written: {path}", highlight=False)


@command("limit", example="depthmup limit configs/digits_resnet.yaml")
@add_config_arguments
@click.option("--lr", type=float, help="The base's learning rate [default: an eighth of the largest stable one].")
def limit(config: Path, overrides: tuple[str, ...], lr: float | None) -> None:
    """Show the limit of a study's rules, and how networks approach it.

    Prints the tangent kernel at each size and in the limit, the largest stable rate and the drift that finite depth
    makes. Then trains residual MLPs under the study's rules, on Gaussian inputs and on its images, and fits how their
    distance to the infinite network falls with width and depth. For norm-free ResNets with one convolution per branch,
    trained with SGD.
    """
    from depthmup.launch.prepare import pack_source
    from depthmup.launch.report.limit import limit_command, refuse_not_covered

    study, console = open_study(config, overrides), open_console()
    refuse_not_covered(study)  # before the images are packed
    if lr is not None and not 0 < lr < float("inf"):
        raise UserError(f"--lr {lr:g}: give a learning rate above 0")
    pack_source(study.file.data, console)
    for path in limit_command(study, lr, console):
        console.print(f"Written: {path}", highlight=False)
