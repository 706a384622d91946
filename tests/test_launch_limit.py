"""What the theory says in the commands: the predicted drift, the command `limit`, and what it refuses."""

import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from depthmup.data.errors import UserError
from depthmup.launch.cli import cli
from depthmup.launch.findings.theory import describe_drift
from depthmup.launch.reading import read_study
from depthmup.launch.report import limit, limit_task
from depthmup.models.config import Size
from depthmup.models.parameterization_config import ParameterizationConfig


def test_the_predicted_drift_is_said_with_the_beta_that_avoids_it() -> None:
    said = describe_drift(ParameterizationConfig(), Size(width=16, depth=12), [12, 48])
    assert said == (
        "depth_mup: in theory the largest stable rate at the start drifts by -1.43 octaves at depth 48 "
        "(-2.05 in the limit); beta 0.289 = 12^-0.5 "
        "brings it to -0.02"
    )
    assert describe_drift(ParameterizationConfig(name="sp"), Size(width=16, depth=12), [12, 48]) is None
    assert describe_drift(ParameterizationConfig(), Size(width=16, depth=12), [12]) is None


def test_plan_says_what_is_predicted_and_nothing_where_nothing_is(study_file: Path) -> None:
    said = CliRunner().invoke(cli, ["plan", str(study_file)], catch_exceptions=False).output
    assert (
        "depth_mup: in theory the largest stable rate at the start drifts by -0.27 octaves at depth 6"
        in said.replace("\n", " ")
    )
    other = CliRunner().invoke(cli, ["plan", str(study_file), "model.norm=batch"], catch_exceptions=False).output
    assert "in theory" not in other


def test_check_says_what_is_predicted_of_the_depths_that_it_looks_at(study_file: Path, tmp_path: Path) -> None:
    size = ["--axis", "depth", "--factors", "1,2", "--steps", "1", "--seeds", "2", "--batch-size", "4"]
    arguments = ["check", str(study_file), *size, "--plot", str(tmp_path / "check.png")]
    said = CliRunner().invoke(cli, arguments).output.replace("\n", " ")
    assert "the largest stable rate at the start drifts by -0.27 octaves at depth 6" in said
    smooth = CliRunner().invoke(cli, [*arguments, "model.activation=tanh"]).output.replace("\n", " ")
    assert "the largest stable rate at the start drifts by -0.09 octaves at depth 6" in smooth
    other = CliRunner().invoke(cli, [*arguments, "model.norm=batch"]).output
    assert "in theory" not in other


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.norm=batch"], "does not cover model.norm batch; it is for a conv_resnet with norm none"),
        (["model.convs_per_branch=2"], "does not cover model.convs_per_branch 2"),
        (["optimizer.name=adamw"], "does not cover optimizer.name adamw"),
        (["optimizer.nesterov=true"], "does not cover optimizer.nesterov"),
        (["optimizer.role_lr.input=2"], "does not cover optimizer.role_lr"),
        (["model={family: vit, head_dim: 8, width: 8, depth: 3, base_width: 8, base_depth: 3}"], "model.family vit"),
        (["study.parameterizations=[sp]"], "none of study.parameterizations has a limit: add depth_mup or completep"),
        (["--lr", "0.5"], "--lr 0.5 is past the edge of stability of depth_mup on Gaussian inputs"),
        (["--lr", "0"], "--lr 0: give a learning rate above 0"),
        (["study.parameterizations=[{name: depth_mup, gamma0: 0}]"], "gamma0"),
        (["study.parameterizations=[{name: depth_mup, gamma0: -1}]"], "gamma0"),
    ],
)
def test_what_the_limit_does_not_cover_is_refused(arguments: list[str], said: str, study_file: Path) -> None:
    with pytest.raises(UserError) as refused:
        CliRunner().invoke(cli, ["limit", str(study_file), *arguments], catch_exceptions=False)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_repeated_and_empty_images_are_no_inputs(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernel is singular. What is left are different images, and too few of them are refused."""
    file = read_study(study_file)
    first = limit_task.load_task(file).inputs
    images = torch.cat([torch.zeros_like(first[:1]), first[:1], 2 * first[:1], first]).reshape(-1, 1, 8, 8)
    batch = images, torch.arange(len(images))
    monkeypatch.setattr(limit_task, "read_held_out", lambda *arguments: batch)
    assert torch.allclose(limit_task.load_task(file).inputs, first)
    batch = images[:5], torch.arange(5)
    with pytest.raises(UserError, match="fewer than 6 different images among its first 5, and repeated inputs make"):
        limit_task.load_task(file)


def test_the_command_shows_networks_nearing_the_limit(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At sizes that take seconds: what has rules nears the limit, and sp does not. Here: with what processes get."""

    def map_here(function: Any, processes: None, *arguments: Any) -> Iterator[Any]:
        return map(*pickle.loads(pickle.dumps((function, *arguments))))

    monkeypatch.setattr(limit, "map_in_processes", map_here)
    for module in (limit, limit_task):
        monkeypatch.setattr(module, "DEPTHS", (3, 6))
    monkeypatch.setattr(limit, "WIDTHS", (16, 64))
    monkeypatch.setattr(limit_task, "SOLVED_DEPTHS", (3, 6, 9))
    monkeypatch.setattr(limit_task, "SITES", 1200)
    monkeypatch.setattr(limit, "SEEDS", 4)
    monkeypatch.setattr(limit, "FEW_SEEDS", 4)
    result = CliRunner().invoke(cli, ["limit", str(study_file)], catch_exceptions=False)
    assert result.exit_code == 0
    folder = study_file.parent / "runs" / "tiny"
    assert {path.name for path in folder.iterdir()} >= set(limit.FILES)
    rates = json.loads((folder / "limit.json").read_text())["rates"]
    assert {rate["task"] for rate in rates} == {"Gaussian inputs", "images"}

    def scatter(name: str) -> list[float]:
        """At every size, from the smallest on, where it is resolved."""
        return next(
            [distance for distance in rate["distance"] if distance is not None]
            for rate in rates
            if (rate["parameterization"], rate["quantity"], rate["measure"]) == (name, "outputs", "scatter")
        )

    said = result.output.replace("\n", " ")
    for task in ("Gaussian inputs", "images"):
        assert f"depth_mup, {task}: " in said
        assert f"sp, {task}: has no limit: outputs scatter" in said
    assert scatter("depth_mup")[-1] < 0.8 * scatter("depth_mup")[0]
    assert max(scatter("sp"), default=math.inf) > scatter("depth_mup")[-1]  # default: beyond measure
