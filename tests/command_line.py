"""Commands of the command line in this process."""

from click.testing import CliRunner, Result

from depthmup.launch.cli import cli


def invoke(*words: object) -> Result:
    """What a command came to, on a wide terminal; a mistake is in the result."""
    return CliRunner().invoke(cli, [str(word) for word in words], terminal_width=200)


def output_of(*words: object) -> str:
    """What a command that succeeds prints. Raises what the command raises."""
    result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
