"""What the commands share. Each imports what it needs when it runs, so that `--help` is quick."""

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from depthmup.data.errors import UserError
from depthmup.launch.paths import ConfigPath, FilePath
from depthmup.train.interrupt import ENDINGS

if TYPE_CHECKING:
    from rich.console import Console

    from depthmup.launch.config import StudyFile
    from depthmup.launch.runs.study import Study


EXAMPLE_WIDTH = 68  # of 80 columns; the rest is indentation and a backslash


class Commands(click.Group):
    """Shows its commands by section, in the order of a user's work."""

    def __init__(self, *arguments: Any, sections: dict[str, list[click.Command]], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.sections = sections
        for command in (command for commands in sections.values() for command in commands):
            self.add_command(command)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, commands in self.sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{command.name:{width}}", command.get_short_help_str(limit=68)) for command in commands]
                )

    def invoke(self, context: click.Context) -> Any:
        """Ctrl-C, a closed terminal and SIGTERM end a command with one line and 128 + the signal, as a shell counts;
        click itself says Aborted! and ends 1."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as stopped:
            click.echo(str(stopped) or "Interrupted; the same command does what is left.", err=True)
            sys.exit(128 + ENDINGS[type(stopped)])


def show_example(example: str) -> str:
    """The example as a help's last paragraph. A long one is cut between its words, so that it can be pasted."""
    lines = [""]
    for word in re.findall(r"(?:'[^']*'|\"[^\"]*\"|\S)+", example):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and len(longer) > EXAMPLE_WIDTH:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\b\nExample:\n  " + " \\\n    ".join(lines)


def command(name: str, example: str, short_help: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """A command with an example at the end of its help."""
    return click.command(name, epilog=show_example(example), short_help=short_help)


def add_config_arguments(function: Callable[..., None]) -> Callable[..., None]:
    """The arguments CONFIG [KEY=VALUE]... and the option --cluster, which is a short form of launch.cluster=..."""

    @click.argument("config", type=ConfigPath())
    @click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    @click.option("--cluster", help="local, debug, slurm, or the name or file of a profile.")
    @functools.wraps(function)
    def wrapped(config: Path, overrides: tuple[str, ...], cluster: str | None, **options: Any) -> None:
        chosen = (f"launch.cluster={cluster}",) if cluster else ()
        function(config=config, overrides=(*overrides, *chosen), **options)

    return wrapped


detachable = click.option(
    "--detach", is_flag=True, help="On Slurm: return at once; a job continues after the runs, to the end."
)


results_out = click.option(
    "--out", type=FilePath(), help="Write to the folder OUT/NAME [default: the study's own folder]."
)


def refuse_detached_elsewhere(study: "Study") -> None:
    """Raises UserError where no Slurm job could go on with the study."""
    if study.file.launch.cluster != "slurm":
        raise UserError(
            f"--detach leaves a Slurm job, and launch.cluster is {study.file.launch.cluster}: add --cluster slurm, or "
            "wait for the runs without --detach"
        )


def read_file(config: Path, overrides: tuple[str, ...]) -> "StudyFile":
    """A study's file, or that of one run as a study of one; warns of what it may not mean."""
    from depthmup.launch.reading import read_study_or_run

    file = read_study_or_run(config, overrides)
    swept_decay = file.study.hyperparameter in ("optimizer.weight_decay", "optimizer.tau_ema")
    if file.decay_warning and not swept_decay:  # the sweep does not use the file's own decay
        click.echo(f"warning: {file.decay_warning}", err=True)
    return file


def open_study(config: Path, overrides: tuple[str, ...]) -> "Study":
    from depthmup.launch.runs.opened import open_planned

    return open_planned(config, read_file(config, overrides), overrides)


def open_console() -> "Console":
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty())
