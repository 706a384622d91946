"""What `depthmup completion` prints makes a shell complete commands, options and files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from depthmup.launch.cli import cli


def source(shell: str) -> str:
    result = CliRunner().invoke(cli, ["completion", shell], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def complete(folder: Path, *words: str) -> list[str]:
    """What bash offers in `folder` for the last of `words`."""
    script = folder / "completion.sh"
    script.write_text(
        f"{source('bash')}\n"
        f"COMP_WORDS=({' '.join(words)})\nCOMP_CWORD={len(words) - 1}\n"
        '_depthmup_completion depthmup\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    bash = [str(shutil.which("bash")), "--norc", str(script)]
    done = subprocess.run(bash, capture_output=True, text=True, timeout=60, cwd=folder, env=os.environ | path)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    assert complete(tmp_path, "depthmup", "tr") == ["transfer", "train"]
    assert "--publish" in complete(tmp_path, "depthmup", "report", "--p")
    assert complete(tmp_path, "depthmup", "new", "flowers", "--family", "conv") == ["conv_resnet"]


@pytest.mark.parametrize(("shell", "binds"), [("zsh", "compdef _depthmup_completion"), ("fish", "complete --no-files")])
def test_other_shells_get_a_script_of_their_own(shell: str, binds: str) -> None:
    text = source(shell)
    assert binds in text
    assert "_DEPTHMUP_COMPLETE" in text


def test_a_shell_that_is_none_is_a_mistake() -> None:
    result = CliRunner().invoke(cli, ["completion", "csh"])
    assert result.exit_code == 2
    assert "'csh' is not one of" in result.output
