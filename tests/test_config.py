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
from depthmup.launch.runs.study import Study
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
        (
            "model.blocks=[1, 1, 1, 1]",
            "model.blocks: unknown key; another family has it; known in this one: activation",
        ),
        ("model=", "model: Input should be keys with values, as {key: value}"),
        ("train.evaluate=minival", "train.evaluate: Input should be a list, as [a, b] (got 'minival')"),
        ("data.name=123", "data.name: Input should be text: put it in quotes, as '123'"),
        ("optimizer.lr=on", "optimizer.lr: Input should be a number (got True)"),
        ("train.samples=yes", "train.samples: Input should be a number (got True)"),
        ("data.mixup=on", "data.mixup: Input should be a number (got True)"),
        ("data.std=.inf", "data.std: Input should be a finite number"),
        ("optimizer.lr=1:30", "optimizer.lr: Input should be a valid number"),
        ("data.rand_augment=rand-p0", "rand_augment 'rand-p0' is none of timm's"),
        ("data.rand_augment=rand-p0.00", "rand_augment 'rand-p0.00' is none of timm's"),
        ("train.evaluate=[val, val]", "evaluate: val is there twice: leave one out"),
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("study.seeds=[0, 0]", "study.seeds: 0 is there twice: leave one out"),
        ("study.seeds=[-1]", "study.seeds.0: Input should be greater than or equal to 0"),
        ("study.seeds=0", "study.seeds: state how many seeds, at least 1, or a list of them"),
        ("study.seeds=on", "study.seeds: state how many seeds"),
        ("study.sizes=[{width: 8, depth: 3}, {width: 8, depth: 3}]", "study.sizes: width 8, depth 3 is there twice"),
        (
            "study.sizes=[{width: 8, depth: 3}, {width: 8, depth: 3, batch: 32}]",
            "study.sizes: width 8, depth 3, batch 32 is there twice",
        ),
        ("study.sizes=[{width: 8, dept: 3}]", "unknown key; did you mean 'study.sizes.0.depth'?"),
        ("study.parameterizations=[{nam: sp}]", "did you mean 'study.parameterizations.0.name'?"),
        ("study.values={frist: 1, last: 8}", "study.values.frist: unknown key; did you mean 'study.values.first'?"),
        ("study.values=on", "study.values.0: Input should be a number (got True)"),
        ("study.budget=0.5", "budget would do nothing: leave it out, as budget=1 does, or use design adaptive"),
        (
            "study={name: x, values: {first: 1, last: 8}, extend: 3}",
            "extend would do nothing: leave it out, as extend=2 does, or use de",
        ),
        ("study.sizes={width:8, depth: 3}", "a space is missing after the colon in 'width:8': write 'width: 8'"),
        (
            "train.evaluate=[val]",
            "minival_loss, which no run would measure: use study.metric=train_loss, or add mini",
        ),
        (
            "data.minival=0",
            "minival_loss, which no run would measure: give data.minival a share, or leave mini",
        ),
        ("model.width=16", "model.width=16 would do nothing: study.sizes says what the study's runs have; change that"),
        ("launch.partition=gpu", "launch.partition would do nothing: launch.cluster is local"),
        ("launch.sbatch.nice=3", "launch.sbatch.nice would do nothing: launch.cluster is local"),
        ("seed=7", "seed=7 would do nothing: study.seeds says"),
        ("optimizer.lr=0.3", "optimizer.lr=0.3 would do nothing: study.values says"),
        ("study..name=x", "a name is missing beside a point; write it like model.depth=48"),
    ],
)
def test_a_bad_study_is_refused_with_the_mend_and_nothing_else(study_file: Path, override: str, message: str) -> None:
    if override.startswith("study={"):
        override = override.replace("name: x", "name: x, parameterizations: [sp], sizes: [{width: 8, depth: 3}]")
    with pytest.raises(UserError) as error:
        read_study(study_file, (override,))
    assert message in str(error.value)
    assert "found 0" not in str(error.value)  # a list of which one item is wrong is not too short
    assert "\n" not in str(error.value)


def test_slots_of_this_machine_are_refused_on_a_command_line_that_starts_none(study_file: Path) -> None:
    assert read_study(study_file, ("launch.slots=2",)).launch.slots == 2
    message = "launch.slots would do nothing: launch.cluster is slurm: add --cluster local, or leave it out"
    with pytest.raises(UserError, match=message):
        read_study(study_file, ("launch.slots=2", "launch.cluster=slurm"))


@pytest.mark.parametrize(
    ("text", "samples"), [("0640", 640), ("6.4e2", 640), ("1_280", 1280), ("0x400", 1024), ("2**10", 1024)]
)
def test_whole_numbers_are_read_as_people_write_them(study_file: Path, text: str, samples: int) -> None:
    assert read_study(study_file, (f"train.samples={text}",)).train.samples == samples


def test_a_file_is_utf_8_whatever_wrote_it_and_an_empty_one_is_said_to_be(study_file: Path) -> None:
    text = study_file.read_text()
    study_file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_study(study_file).study.name == "tiny"
    study_file.write_text("# nothing yet\n")
    with pytest.raises(UserError, match=r"expected sections .*, found nothing"):
        read_study(study_file)
    study_file.write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match="not text in UTF-8"):
        read_study(study_file)


def test_a_memory_too_short_is_refused_in_its_own_words_with_one_that_is_not(run_settings: dict[str, Any]) -> None:
    set_dotted(run_settings, "optimizer.tau_ema=1e-6")
    with pytest.raises(
        UserError, match=r"optimizer.tau_ema 1e-06 lets a weight remember .* use optimizer.tau_ema="
    ) as error:
        from_plain(RunConfig, run_settings, "my.yaml")
    set_dotted(run_settings, "optimizer.tau_ema=" + str(error.value).rpartition("tau_ema=")[2].split()[0])
    from_plain(RunConfig, run_settings, "my.yaml")


@pytest.mark.parametrize("key", ["active_share=0.5", "balance_rate=0.5"])
def test_what_only_several_experts_read_is_refused_for_one(run_settings: dict[str, Any], key: str) -> None:
    model = {"family": "moe_vit", "width": 16, "depth": 3, "base_width": 16, "base_depth": 3, "head_dim": 8}
    shape = {"patch_size": 2, "num_classes": 10, "image_size": 8, "in_channels": 1}
    run_settings["model"] = model | shape
    from_plain(RunConfig, run_settings, "my.yaml")
    set_dotted(run_settings, f"model.{key}")
    with pytest.raises(UserError, match=r"would do nothing: model\.num_experts is 1"):
        from_plain(RunConfig, run_settings, "my.yaml")


def test_a_number_of_seeds_counts_however_it_is_written(study_file: Path) -> None:
    assert read_study(study_file, ("study.seeds=1e1",)).study.seeds == tuple(range(10))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.log_every", "[1, 2, 3]"), "train.log_every changes how a run is trained, not what it learns"),
        (("parallel.micro_batch_size", "[8, 16, 32]"), "changes how a run is trained"),
        (("model.width", "[8, 16, 32]"), "model.width: study.sizes sets the sizes: sweep another key"),
        (("data.validation_share", "[0.1, 0.2, 0.4]"), "losses on other images are not comparable"),
        (("train.ema", "[0.5, 0.9, 0.99]"), "the metric is that of the weights, not of their average"),
        (("train.samples", "[64, 128, 256]"), "losses after another number of samples are not comparable"),
        (("parameterization.alpha", "[0.5, 0.75, 1]"), r"do nothing at the base .*parameterizations=.{alpha: 0.5}, {"),
    ],
)
def test_a_sweep_of_what_settles_nothing_is_refused(study_file: Path, settings: tuple[str, str], message: str) -> None:
    key, values = settings
    preset = "study.parameterizations=[depth_mup]"
    file = read_study(study_file, (f"study.hyperparameter={key}", f"study.values={values}", preset))
    with pytest.raises(UserError, match=message):
        _ = Study(study_file, file).runs


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
