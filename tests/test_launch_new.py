"""`depthmup new` and `depthmup doctor`: a study fitted to the images, and what is said of a machine."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from depthmup.data import lock
from depthmup.data.errors import UserError
from depthmup.data.paths import PACKAGE
from depthmup.launch import doctor
from depthmup.launch.cli import cli
from depthmup.launch.new import FEWEST_STEPS
from depthmup.launch.path_cost import PathCost, count_path
from depthmup.launch.reading import read_study
from depthmup.launch.scale import read_changes
from depthmup.launch.wording import show_quantity, show_share
from depthmup.models.parameterization import AUTO, PRESETS
from depthmup.models.parameterization_config import find_kind


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], terminal_width=200)


def write_images(
    folder: Path, classes: int, pixels: int, mode: str, splits: tuple[str, ...] = ("",), each: int = 4
) -> Path:
    generator = np.random.default_rng(0)
    for split in splits:
        for label in range(classes):
            place = folder / split / f"class-{label}"
            place.mkdir(parents=True)
            for number in range(each):
                values = generator.integers(0, 255, (pixels + 3, pixels, 3), dtype=np.uint8)
                Image.fromarray(values).convert(mode).save(place / f"{number}.png")
    return folder


@pytest.mark.parametrize("family", ["vit", "conv_resnet", "resnet"])
@pytest.mark.parametrize(("pixels", "mode", "side"), [(9, "L", 8), (33, "RGB", 32), (300, "RGB", 224)])
def test_a_new_study_fits_its_images_and_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, pixels: int, mode: str, side: int
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_images(tmp_path / "pictures of mine", 3, pixels, mode)
    made = invoke("new", "flowers", "--family", family, "--source", source)
    assert made.exit_code == 0, made.output
    file = read_study(Path("flowers.yaml"))
    assert (file.model.family, file.model.image_size) == (family, side)
    assert (file.model.num_classes, file.model.in_channels) == (3, 1 if mode == "L" else 3)
    assert file.data.name == "pictures-of-mine"
    assert Path(str(file.data.source)) == source
    assert file.data.validation_share > 0
    chosen, control = file.study.parameterizations
    tells = AUTO.get((find_kind(file.model), file.optimizer.name))  # what published studies say of this kind
    assert (chosen.name, control.name) == (tells.preset if tells else "depth_mup", "sp")
    assert chosen.beta == (file.model.base_depth ** -PRESETS[chosen.name].alpha if tells and tells.absolute else 1)
    planned = invoke("plan", "flowers.yaml")
    assert planned.exit_code == 0, planned.output
    assert "0 done" in planned.output


@pytest.mark.parametrize(
    ("each", "batch"),
    [
        (20, 32),  # 60 images: 6 for validation, 5 of the others for minival, 49 to train on
        (27, 64),  # 81: 8, 7, 66
        (2, 4),  # 6: 1 and 1
    ],
)
def test_the_batch_of_a_new_study_is_no_more_than_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: int, batch: int
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_images(tmp_path / "few", 3, 9, "L", each=each)
    made = invoke("new", "mine", "--network", "vit", "--source", source)
    assert made.exit_code == 0, made.exception
    file = read_study(Path("mine.yaml"))
    assert (file.train.global_batch_size, file.data.num_streams) == (batch, batch)
    trained = invoke("train", "mine.yaml", f"train.samples={batch}", "train.device=cpu")
    assert trained.exit_code == 0, trained.output
    assert invoke("plan", "mine.yaml").exit_code == 0
    small, large = f"train.global_batch_size={2 * batch}", f"data.num_streams={2 * batch}"
    refused = str(invoke("plan", "mine.yaml", small, large).exception)
    assert re.search(
        rf"mine.yaml: train.global_batch_size {2 * batch} is more than the \d+ training samples: "
        rf"use {batch}, and data.num_streams={batch}$",
        refused,
    )
    (tmp_path / "shards" / "few" / "index.json").unlink()  # packed anew by the launch, which then knows
    launched = invoke("launch", "mine.yaml", small, large)
    assert str(launched.exception) == refused
    assert len(list((tmp_path / "runs").iterdir())) == 1, "a run was launched"


@pytest.mark.parametrize("splits", [("",), ("train", "val")])
def test_images_of_which_none_can_be_held_out_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_images(tmp_path / "few", 2, 9, "L", splits, each=2)
    refused = invoke("new", "mine", "--source", source)
    assert isinstance(refused.exception, UserError)
    assert "a share of 0.1 of 4 images is none: give more images" in str(refused.exception)
    assert not Path("mine.yaml").exists()


def test_a_targets_batch_is_the_studys_and_no_more_than_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, target = write_images(tmp_path / "few", 3, 9, "L", each=20), "width=768,depth=24,samples=1e8,batch="
    refused = invoke("new", "mine", "--source", source, "--target", f"{target}50")
    assert "batch of 50 is more than the 49 images to train on: give batch=32" in str(refused.exception)
    assert not Path("mine.yaml").exists()
    made = invoke("new", "mine", "--source", source, "--target", f"{target}48")
    assert made.exit_code == 0, made.exception
    file = read_study(Path("mine.yaml"))
    assert (file.train.global_batch_size, file.data.num_streams) == (48, 16)  # the largest divisor of both


def cost_of(name: str) -> PathCost:
    file = Path(f"{name}.yaml")
    return count_path(file, read_study(file), read_changes(Path(f"{name}_target.yaml"), ()))


@pytest.mark.parametrize("family", ["vit", "conv_resnet", "resnet"])
@pytest.mark.parametrize("share", [0.01, 0.04])
def test_tuning_a_proxy_that_is_sized_for_a_target_costs_the_share_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, share: float
) -> None:
    monkeypatch.chdir(tmp_path)
    size = "width=768,depth=24,samples=4e9,batch=256"
    made = invoke("new", "large", "--family", family, "--target", size, "--share", share)
    assert made.exit_code == 0, made.output
    cost = cost_of("large")
    assert str(cost) in made.output
    assert 0.98 * share < cost.share <= share
    assert cost.search > 0
    file = read_study(Path("large.yaml"))
    assert file.tune
    assert file.train.global_batch_size == 256
    longer = [each for each in file.study.sizes if each.samples not in (None, file.train.samples)]
    assert len(longer) == (4 * file.train.samples <= 4e9)
    assert {(each.width, each.depth) for each in longer} <= {(file.model.base_width, file.model.base_depth)}
    planned = invoke("plan", "large.yaml", "--target", "large_target.yaml")
    assert planned.exit_code == 0, planned.output
    assert f"Tuning costs at most {show_share(cost.share)} of the target's" in planned.output
    assert f"{show_quantity(cost.search)}FLOPs in all" in planned.output  # of the search's own plan
    assert (
        f"at most {show_quantity(cost.study)}FLOPs (study.budget)" in invoke("plan", "large.yaml", "tune=null").output
    )


def test_runs_of_a_proxy_are_no_longer_than_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much may be spent."""
    monkeypatch.chdir(tmp_path)
    assert invoke("new", "large", "--target", "width=1024,depth=96,samples=64000", "--share", 0.9).exit_code == 0
    file = read_study(Path("large.yaml"))
    assert file.train.samples == 64000
    assert {each.samples for each in file.study.sizes} == {None}


def test_a_target_that_cannot_pay_for_its_tuning_is_refused_with_the_share_that_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("new", "large", "--target", "width=256,depth=24,samples=640000")
    refused = invoke(*words)
    assert (found := re.search(r"add --share (\S+), or", str(refused.exception))), refused.output
    assert not list(tmp_path.iterdir())
    assert invoke(*words, "--share", found[1]).exit_code == 0
    assert read_study(Path("large.yaml")).train.num_steps >= FEWEST_STEPS


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("width=64,depth=3", "give a target more than twice as wide or as deep"),
        ("width=32,depth=48", "give a target"),
        ("width=768", "depth: missing"),
        ("widht=768,depth=3", "did you mean 'width'?"),
        ("768x24", "looks like width=768,depth=24"),
        ("", "looks like width=768,depth=24"),
        ("width=768,width=10,depth=24", "width is given twice"),
        ("width=768,depth=24,num_experts=4", "num_experts would do nothing"),
    ],
)
def test_a_target_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = invoke("new", "large", "--target", target)
    assert isinstance(refused.exception, UserError)
    assert said in str(refused.exception)
    assert "--share 0.5 would do nothing" in str(invoke("new", "large", "--share", "0.5").exception)
    assert not list(tmp_path.iterdir())


def test_splits_of_the_source_are_kept_and_shards_with_an_index_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_images(tmp_path / "images", 2, 20, "RGB", ("train", "val"))
    assert invoke("new", "split", "--source", source).exit_code == 0
    assert read_study(Path("split.yaml")).data.validation_share == 0
    assert invoke("pack", source, "packed").exit_code == 0
    assert invoke("new", "indexed", "--source", "packed").exit_code == 0
    file = read_study(Path("indexed.yaml"))
    assert file.data.source is None
    assert Path(file.data.root) == tmp_path / "packed"
    assert (file.model.num_classes, file.model.image_size) == (2, 16)


def test_a_new_study_replaces_no_file_and_says_what_is_wrong_with_a_name_or_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("kept")
    (tmp_path / "empty").mkdir()
    broken = write_images(tmp_path / "broken", 1, 20, "L")
    for file in broken.rglob("*.png"):
        file.write_bytes(b"no image")
    for words, said in (
        (("mine",), "mine.yaml exists already"),
        (("a/b",), "must be letters"),
        (("other", "--source", "nowhere"), "no such folder or tar"),
        (("other", "--source", "empty"), "no images"),
        (("other", "--source", "broken"), "none of its images can be read"),
    ):
        refused = invoke("new", *words)
        assert refused.exit_code, words
        assert said in str(refused.exception), words
    assert Path("mine.yaml").read_text() == "kept"
    assert not Path("other.yaml").exists()


def test_the_doctor_names_what_keeps_runs_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    well = invoke("doctor", "--directory", tmp_path / "not" / "there" / "yet")
    assert well.exit_code == 0, well.output
    assert "Runs can start here." in well.output
    assert "no sbatch on PATH" in well.output

    with monkeypatch.context() as patched:
        patched.setitem(doctor.EXTRAS, "no-such-package", "wandb")
        assert "'depthmup[wandb]'" in invoke("doctor", "--directory", tmp_path).output
    assert list(tmp_path.iterdir()) == []

    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patched:
        patched.setattr(lock.fcntl, "flock", without_locks)
        ill = invoke("doctor", "--directory", tmp_path)
    assert ill.exit_code == 1
    assert "To be fixed first: file locks." in ill.output
    assert list(tmp_path.iterdir()) == []

    for name in ("sbatch", "sinfo"):
        (tmp_path / name).write_text(
            "#!/bin/sh\necho 'sinfo: error: no host' >&2\necho 'sinfo: fatal: no source; no port' >&2\nexit 1"
        )
        (tmp_path / name).chmod(0o755)
    said = " ".join(invoke("doctor", "--directory", tmp_path / "runs").output.split())
    assert "no job can be submitted from here: sinfo: fatal: no source; no port" in said
    assert "no host" not in said

    (tmp_path / "file").write_text("")
    ill = invoke("doctor", "--directory", tmp_path / "file" / "runs")
    assert ill.exit_code == 1
    assert "cannot be written to" in ill.output


def test_the_doctor_finds_a_key_of_wandb_where_wandb_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not doctor.has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert doctor.has_wandb_key()
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine {doctor.WANDB_HOST} login user password {'x' * 40}\n")
    netrc.chmod(0o600)
    assert doctor.has_wandb_key()


def test_recipes_that_come_with_the_package_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits_resnet", "digits_resnet.yaml", "configs/digits_resnet.yaml"):
        assert "runs (0 done)" in invoke("plan", name).output
    own = yaml.safe_load((PACKAGE / "configs" / "digits_resnet.yaml").read_text())
    own["study"] |= {"values": [0.1, 0.2, 0.4], "seeds": [0], "parameterizations": ["sp"], "drift_precision": None}
    own["study"]["sizes"] = own["study"]["sizes"][:1]
    Path("digits_resnet.yaml").write_text(yaml.safe_dump(own))
    assert "\n3 runs (0 done)" in invoke("plan", "digits_resnet.yaml").output  # what is there comes first
    missing = CliRunner().invoke(cli, ["plan", "digits_resnets"])
    assert "digits_resnets: No such file" in str(missing.exception)
