"""Configuration: what is accepted, what is refused and how, and what makes two runs the same run."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from depthmup.data.errors import UserError
from depthmup.launch.config import LaunchConfig
from depthmup.launch.reading import read_run, read_study
from depthmup.launch.scale import read_changes
from depthmup.train.__main__ import read_config
from depthmup.train.config import ParallelConfig, RunConfig, run_hash
from depthmup.train.reading import from_plain, set_dotted, to_yaml


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.wdth=3", "model.wdth: unknown key; did you mean 'model.width'"),
        ("optimiser.lr=1", "optimiser: unknown key; did you mean 'optimizer'"),
        ("width=3", "width: unknown key; did you mean 'model.width'?"),
        ("model.lr=3", "model.lr: unknown key; did you mean 'optimizer.lr'?"),
        ("model.head_dim=4", "model.head_dim: unknown key"),
        ("model.family=resnot", "model.family: unknown 'resnot'; did you mean 'resnet'?"),
        ("model={width: 8}", "model.family: missing; use 'vit' or 'resnet' or 'conv_resnet'"),
        ("model.width=broad", "model.width: Input should be a valid integer"),
        ("optimizer.lr=0", "optimizer.lr: Input should be greater than 0"),
        ("optimizer.lr=.nan", "optimizer.lr: Input should be a finite number"),
        ("model.depth=4", "depth 4 must be a multiple of num_stages 3: use 3 or 6"),
        (
            "data.window=day",
            "data.window: Input should be 'epoch' (got 'day')",
        ),
        (
            "data.num_streams=5",
            "num_streams 5 must divide train.global_batch_size 32: use train.global_batch_size=30 or",
        ),
        ("train.samples=5", "samples 5 is less than one global batch of 32"),
    ],
)
def test_a_bad_key_or_value_is_refused_with_its_name_and_the_mend(
    run_settings: dict[str, Any], override: str, message: str
) -> None:
    set_dotted(run_settings, override)
    with pytest.raises(UserError) as error:
        from_plain(RunConfig, run_settings, "my.yaml")
    assert "my.yaml: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_vit_width_that_the_head_dim_does_not_divide_is_refused_with_the_nearest_widths(
    run_settings: dict[str, Any],
) -> None:
    run_settings["model"] = {
        **{"family": "vit", "width": 100, "depth": 2, "base_width": 64, "base_depth": 2},
        **{"head_dim": 64, "patch_size": 4, "image_size": 8},
    }
    with pytest.raises(UserError, match="width 100 must be a multiple of head_dim 64: use 64 or 128"):
        from_plain(RunConfig, run_settings, "my.yaml")


def test_every_mistake_is_named_at_once(run_settings: dict[str, Any]) -> None:
    run_settings["model"]["wdth"] = 3
    run_settings["optimizer"]["lr"] = -1
    with pytest.raises(UserError, match=r"model\.wdth.*optimizer\.lr"):
        from_plain(RunConfig, run_settings, "my.yaml")


def test_a_saved_configuration_reads_back_as_the_same_run(run_config: RunConfig) -> None:
    again = from_plain(RunConfig, yaml.safe_load(to_yaml(run_config)), "saved")
    assert again == run_config
    assert run_hash(again) == run_hash(run_config)


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("optimizer.lr=2**-4", True),  # another way of writing the same number
        ("data.root=/elsewhere", True),
        ("data.num_workers=2", True),
        ("track.wandb=offline", True),
        ("train.device=auto", True),
        ("train.log_every=7", True),
        ("optimizer.lr=2**-5", False),
        ("seed=1", False),
        ("model.depth=6", False),
        ("parameterization.name=sp", False),
        ("train.samples=1000", False),
        ("data.name=other", False),
        ("schedule.warmup=0.2", False),
    ],
)
def test_a_run_is_identified_by_what_changes_its_result_only(
    run_settings: dict[str, Any], run_config: RunConfig, override: str, same: bool
) -> None:
    set_dotted(run_settings, override)
    changed = from_plain(RunConfig, run_settings, "test")
    assert (run_hash(changed) == run_hash(run_config)) == same


def test_overrides_reach_into_sections_and_powers_of_two_are_numbers(study_file: Path) -> None:
    config = read_run(study_file, ("optimizer.lr=2**-9", "model.depth=48", "track.wandb=off"))
    assert config.optimizer.lr == 2**-9
    assert config.model.depth == 48
    assert config.track.wandb == "off"


def test_a_process_of_a_run_takes_every_file_that_the_command_takes(study_file: Path) -> None:
    """With a study, its launch section and a holder of anchors, as `depthmup scale` writes them."""
    raw = yaml.safe_load(study_file.read_text())
    raw |= {"launch": {"cluster": "slurm", "nodes": 2}, "x-rate": 0.25}
    study_file.write_text(yaml.safe_dump(raw))
    assert "study" in raw
    assert read_config(study_file, ["optimizer.lr=0.5"]) == read_run(study_file, ("optimizer.lr=0.5",))
    with pytest.raises(UserError, match="studdy: unknown key"):
        read_config(study_file, ["studdy.name=a"])


def test_a_study_must_start_with_its_base(study_file: Path) -> None:
    with pytest.raises(UserError, match="must be the base"):
        read_study(study_file, ("study.sizes=[{width: 8, depth: 6}]",))


@pytest.mark.parametrize(("section", "kind"), [("launch", LaunchConfig), ("parallel", ParallelConfig)])
def test_the_documentation_has_a_line_with_the_default_of_every_key(section: str, kind: type) -> None:
    text = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text()
    table = text.split(f"| key of `{section}:` |")[1].split("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    defaults = {}
    for names, values in rows:
        keys = re.findall(r"`(\w+)`", names)
        defaults |= zip(
            keys, values.split(", ") if len(keys) > 1 and "," in values else [values] * len(keys), strict=True
        )
    assert defaults.keys() == {field.name for field in fields(kind)}
    for field in fields(kind):
        if isinstance(field.default, int | str):
            assert defaults[field.name].strip(" `") == str(field.default), field.name


def test_the_target_in_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text()
    target = tmp_path / "target.yaml"
    target.write_text(text.split("```yaml\n")[1].split("```")[0].replace("cluster: big", "cluster: slurm"))
    changes = read_changes(target, ())
    from_plain(LaunchConfig, changes["launch"], "launch")
    from_plain(ParallelConfig, changes["parallel"], "parallel")
