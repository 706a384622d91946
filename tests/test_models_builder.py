"""Networks of one's own in a study: a function of a file builds them, and their roles are found."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from depthmup import models
from depthmup.data.errors import UserError
from depthmup.launch.cli import cli
from depthmup.launch.reading import read_run, read_study
from depthmup.models.build import build, build_meta
from depthmup.models.config import OwnConfig
from depthmup.models.errors import ModelError
from depthmup.models.own import OWN
from depthmup.train.config import RunConfig, run_hash
from depthmup.train.loop import run as train
from depthmup.train.owner import describe_owner, list_differences
from depthmup.train.packs.pack import run_pack
from depthmup.train.reading import from_plain, to_yaml
from depthmup.train.yaml_text import load_yaml
from plain_network import Net
from stranger_network import make_network
from train_configs import pack_digits, run_config

STRANGER = Path(__file__).with_name("stranger_network.py")
CODE = STRANGER.read_text()
SIZE = {"width": 32, "depth": 4, "base_width": 16, "base_depth": 2}
SHAPE: dict[str, Any] = {"num_classes": 10, "image_size": 8}
PLAIN = Path(__file__).with_name("plain_network.py").read_text()
COMPLETEP = models.ParameterizationConfig(name="completep")


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], terminal_width=200)


def own(code: str = CODE, builder: str = "make_network", **changes: Any) -> OwnConfig:
    return OwnConfig(builder=builder, code=code, **{**SIZE, **SHAPE, **changes})


def test_a_network_of_a_file_has_the_roles_and_weights_that_the_call_gives_it() -> None:
    scaled = build(own(), COMPLETEP, seed=3)
    called = models.build_scaled(
        make_network,
        size=models.Size(width=32, depth=4),
        base=models.Size(width=16, depth=2),
        inputs=torch.zeros(1, 3, 8, 8),
        parameterization=COMPLETEP,
        seed=3,
    )
    assert scaled.roles == called.roles
    for (name, ours), (other, theirs) in zip(
        scaled.network.named_parameters(), called.network.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(scaled.network(images), called.network(images))


def test_a_builder_is_given_what_it_has_arguments_for() -> None:
    """A class is a builder, too."""
    scaled = build(own(PLAIN, "Net", in_channels=1, num_classes=7), COMPLETEP, seed=0)
    assert scaled.network(torch.zeros(3, 1, 8, 8)).shape == (3, 7)
    everything = PLAIN + "\ndef build(width, depth, **shape):\n    return Net(width, depth, **shape)\n"
    assert build_meta(own(everything, "build"), COMPLETEP).roles == OWN.roles(own(PLAIN, "Net"))


@pytest.mark.parametrize(
    ("code", "changes", "said"),
    [
        (CODE, {"num_classes": 7}, r"logits of shape \(2, 7\), as model.num_classes says, and gives some of shape"),
        (CODE, {"in_channels": 1}, r"fails on images of shape \(2, 1, 8, 8\): RuntimeError: .*\(line \d+\)"),
        (CODE, {"builder": "make_netwrok"}, "nothing there is called 'make_netwrok'; nearest: make_network"),
        (CODE, {"builder": "math"}, r"math is no function \(width, depth\)"),
        (CODE, {"width": 33}, "at 2.0625 times the base's width"),
        (CODE + "\nx = (", {}, r"not Python, line \d+: '\(' was never closed"),
        ("import no_such_module\n" + CODE, {}, "No module named 'no_such_module': a run has the one file with it"),
        ("x = 1 / 0\n" + CODE, {}, r"ZeroDivisionError: division by zero \(line 1\)"),
        (CODE.replace("depth=depth))", "depht=depth))"), {}, r"make_network\(.*'depht' \(line \d+\)"),
        ("def make_network(width, depth): raise SystemExit('no')", {}, r"SystemExit: no \(line 1\)"),
        ("def make_network(width, depth): raise OSError('a\\nb')", {}, r"OSError: a \(line 1\)$"),
        ("def make_network(width): ...", {}, r"must take \(width, depth\), two numbers"),
        ("def make_network(width, depth): return 3", {}, "gave a int and no torch.nn.Module"),
        (CODE.replace("return self.classifier(", "return (1, self.classifier)  # "), {}, "and gives tuple"),
        ("", {}, "names no file: write FILE.py:FUNCTION"),
    ],
    ids=lambda value: "" if not isinstance(value, str) or len(value) > 80 else value,
)
def test_a_builder_that_is_none_is_refused_with_the_place(code: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        build(own(code, **changes), COMPLETEP, seed=0)


def own_run(file: Path, function: str = "make_network") -> dict[str, Any]:
    return {
        "model": {"family": "own", "builder": f"{file}:{function}", **SIZE, **SHAPE},
        "optimizer": {"lr": 0.01},
        "data": {"name": "x", "root": "x", "num_streams": 1},
        "train": {"samples": 1, "global_batch_size": 1},
    }


def test_what_the_file_does_is_part_of_the_runs_identity_and_stays_with_it(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(CODE)
    run = from_plain(RunConfig, own_run(file), "test")
    written = to_yaml(run)
    assert "    class Block(nn.Module):\n" in written  # line by line, to be read

    file.write_text(CODE.replace('"""Attention, then a gated MLP."""', "# says the same\n"))
    assert run_hash(from_plain(RunConfig, own_run(file), "test")) == run_hash(run)
    file.write_text(CODE.replace("* 0.02", "* 0.03"))
    other = from_plain(RunConfig, own_run(file), "test")
    assert run_hash(other) != run_hash(run)
    assert [text.partition(":")[0] for text in list_differences(describe_owner(run), other)] == ["model.code"]
    assert len(list_differences(describe_owner(run), other)[0]) < 100  # fingerprints, not the text

    file.unlink()
    assert from_plain(RunConfig, load_yaml(written, "written"), "test") == run
    with pytest.raises(UserError, match=r"test: model.builder: .*net.py: No such file"):
        from_plain(RunConfig, own_run(file), "test")


@pytest.mark.parametrize(("code", "builder"), [(CODE, make_network), (PLAIN, Net)], ids=["attention", "plain"])
def test_a_pack_of_own_networks_and_runs_alone_learn_the_same_and_an_export_computes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, builder: Any
) -> None:
    shards = pack_digits(tmp_path / "digits")
    file = tmp_path / "net.py"
    file.write_text(code)
    model = {"family": "own", "builder": f"{file}:{builder.__name__}", **SIZE}
    first = run_config(shards, "optimizer.name=adamw", "model.in_channels=3", "train.samples=256", model=model)
    configs = [first, replace(first, optimizer=replace(first.optimizer, lr=0.01))]
    alone = [train(config, tmp_path / f"alone-{number}") for number, config in enumerate(configs)]
    packed = run_pack(configs, [tmp_path / f"packed-{number}" for number in range(2)])
    for one, other in zip(alone, packed, strict=True):
        assert one["outcome"] == other["outcome"] == "completed"
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)

    run = tmp_path / "alone-0"
    (run / "config.yaml").write_text(to_yaml(first))
    out = tmp_path / "out.safetensors"
    monkeypatch.chdir(tmp_path)  # the printed code names OUT as it was given
    exported = invoke("export", run, "out.safetensors")
    assert exported.exit_code == 0, exported.exception
    names: dict[str, Any] = {builder.__name__: builder}
    exec(exported.output.partition("In Python:")[2], names)
    scaled = build(first.model, first.parameterization, seed=0)
    scaled.network.load_state_dict(load_file(run / "weights.safetensors"))
    images = torch.randn(4, 3, 8, 8)
    ours, theirs = scaled.network.eval()(images), names["network"].eval()(images)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert out.exists()
    assert "a folder is for networks of timm's" in str(invoke("export", run, tmp_path / "folder").exception)


@pytest.mark.parametrize(
    ("network", "title", "base", "expected"),
    [
        ("net.py:make_network", "make_network", "width=16,depth=2", {"family": "own", "in_channels": 3, "width": 16}),
        ("plain.py:Net", "Net", "width=16,depth=2", {"family": "own", "in_channels": 1}),
        ("resnet10t", "resnet10t", "", {"family": "timm", "timm_name": "resnet10t", "depth": 1, "in_channels": 1}),
        ("vit_tiny_patch16_224", "vit_tiny", "", {"family": "timm", "head_dim": 16, "image_size": 16}),
    ],
)
def test_a_new_study_takes_any_name_of_timms_and_a_file_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, title: str, base: str, expected: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(CODE)
    Path("plain.py").write_text(PLAIN)
    made = invoke("new", "mine", "--network", network, *(["--base", base] if base else []))
    assert made.exit_code == 0, made.exception
    assert f"does the learning rate of a small {title}" in Path("mine.yaml").read_text()
    file = read_study(Path("mine.yaml"))
    assert vars(file.model).items() >= expected.items()
    found, control = file.study.parameterizations
    assert (found.name, control.name) == ("completep", "sp")
    blocks = len(build_meta(file.model, COMPLETEP).blocks)
    assert found.beta == pytest.approx(1 / blocks, rel=0.01)  # branches are divided by the number of all blocks
    planned = invoke("plan", "mine.yaml")
    assert planned.exit_code == 0, planned.exception


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--network", "resnet10tt"), "nearest: resnet10t.*Beside timm's names there are vit, conv_resnet, resnet"),
        (("--network", "none.py:f"), "model.builder: none.py: No such file"),
        (("--network", "net.py:g"), "nothing there is called 'g'"),
        (("--network", "dla34"), "no argument of its class is a depth"),
        (("--base", "width=16"), "depth: missing"),
        (("--base", "width=64,depth=3,samples=7"), "samples and batch are the study's own"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_network_that_a_new_study_cannot_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("def f(width, depth): ...")
    refused = invoke("new", "mine", *words)
    assert isinstance(refused.exception, UserError)
    with pytest.raises(UserError, match=said):
        raise refused.exception
    assert not Path("mine.yaml").exists()


def test_a_written_configuration_names_another_file_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(CODE)
    config = tmp_path / "run.yaml"
    config.write_text(to_yaml(from_plain(RunConfig, own_run(file), "test")))
    file.write_text(PLAIN)
    assert json.dumps(read_run(config).model.code) == json.dumps(CODE)  # type: ignore[union-attr]
    assert read_run(config, (f"model.builder={file}:Net",)).model.code == PLAIN  # type: ignore[union-attr]
