"""Paths of the commands on data: what a shell would have read for a user is read for them."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from depthmup.data.errors import UserError
from depthmup.data.paths import expand_path
from depthmup.launch.cli import cli
from image_sets import make_folder


def test_home_and_variables_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert expand_path("~") == "/home/me"
    assert expand_path("~/x") == "/home/me/x"
    assert expand_path("$SCRATCH/x") == expand_path("${SCRATCH}/x") == "/scratch/me/x"
    for path in ("/a/b", "s3://bucket/train-{000..009}.tar", "a~b", "", "sklearn:digits", "5$"):
        assert expand_path(path) == path


def test_what_cannot_be_expanded_is_refused(monkeypatch):
    monkeypatch.delenv("SCRATCH", raising=False)
    for path in ("$SCRATCH/x", "/data/${SCRATCH}"):
        with pytest.raises(UserError, match="the variable SCRATCH is not set"):
            expand_path(path)
    with pytest.raises(UserError, match="no such user"):
        expand_path("~nobody-of-this-name/x")


def test_every_path_of_the_commands_is_expanded(tmp_path, monkeypatch):
    make_folder(tmp_path / "images", 12)
    names = tmp_path / "names.txt"
    names.write_text("class0 first\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    assert "class0 first" in run("pack", "~/images", "$PLACE/shards", "--class-names", "~/names.txt")
    assert "sheet" in run("inspect", "~/shards", "--sheet", "$PLACE/sheet.png", "--processes", "1")
    (tmp_path / "shards" / "index.json").unlink()
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    run("index", "~/shards/train-{000000..000000}.tar", "--out", "~/shards", "--classes", "$PLACE/names.txt")
    assert (tmp_path / "shards" / "index.json").exists()
    assert (tmp_path / "sheet.png").exists()
    assert not os.listdir(Path.cwd())
