"""What `--help` prints: it fits a terminal, and its examples can be pasted."""

import shlex
from collections.abc import Iterator
from importlib.metadata import version

import click
import pytest
from click.testing import CliRunner

from depthmup.launch.cli import cli
from depthmup.launch.commands.group import EXAMPLE_WIDTH, show_example


def paths(group: click.Group, *above: str) -> Iterator[tuple[str, ...]]:
    """Every command and group below `group`, as the words that call it."""
    for name, member in group.commands.items():
        yield *above, name
        if isinstance(member, click.Group):
            yield from paths(member, *above, name)


def help_of(*words: str) -> str:
    result = CliRunner().invoke(cli, [*words, "--help"], terminal_width=80)
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("words", [(), *paths(cli)], ids=" ".join)
def test_help_fits_80_columns(words: tuple[str, ...]) -> None:
    assert all(len(line) <= 80 for line in help_of(*words).splitlines())


def test_the_list_of_commands_says_each_in_one_line_that_is_not_cut() -> None:
    listed = help_of().split("A study:")[1].splitlines()
    lines = [line for line in listed if line.startswith("  ")]
    assert len(lines) == len(cli.commands)  # type: ignore[attr-defined]
    assert not [line for line in lines if line.endswith("...")]


@pytest.mark.parametrize("words", [each for each in paths(cli) if each != ("cluster",)], ids=" ".join)
def test_every_command_has_an_example_that_calls_it(words: tuple[str, ...]) -> None:
    shown = help_of(*words).split("Example:")[1]
    given = shlex.split(shown.replace("\\\n", " "))
    assert any(tuple(given[at : at + len(words) + 1]) == ("depthmup", *words) for at in range(len(given))) or (
        f"depthmup {' '.join(words)}" in given[-1]  # within a substitution
    )


def test_a_long_example_is_cut_between_its_words_and_means_the_same() -> None:
    example = "depthmup verify large.yaml 'verify.space={optimizer.lr: 4, optimizer.weight_decay: 8}' verify.width=128"
    shown = show_example(example).removeprefix("\b\nExample:\n")
    assert len(shown.splitlines()) > 1
    assert all(len(line) <= EXAMPLE_WIDTH + 6 for line in shown.splitlines())
    assert shlex.split(shown.replace("\\\n", " ")) == shlex.split(example)


def test_the_version_is_that_of_the_package() -> None:
    said = CliRunner().invoke(cli, ["--version"], catch_exceptions=False).output
    assert said == f"depthmup {version('depthmup')}\n"
