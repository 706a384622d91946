"""A finished run exports to a plain timm network with the same logits; a network of one's own is scaled by `apply`."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
import timm
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from depthmup import models
from depthmup.data.errors import UserError
from depthmup.launch.cli import cli
from depthmup.launch.export import export_run
from depthmup.models import Init, ParameterizationConfig, ParameterRule, Role, Roles, Size, Slot
from depthmup.models.build import build
from depthmup.models.coordinate_check import Settings, check_sizes, rms
from depthmup.models.discovery.find import find_roles
from depthmup.models.errors import ModelError
from depthmup.models.export import folded_state
from depthmup.models.family import match_rules
from depthmup.train.config import RunConfig
from depthmup.train.owner import describe_owner
from depthmup.train.reading import from_plain, to_yaml
from depthmup.train.rundir import RunDirectory

VIT = {"family": "vit", "patch_size": 8, "image_size": 32, "num_heads": 4}
RESNET = {
    "family": "resnet",
    "image_size": 32,
    "width": 32,
    "base_width": 16,
    "depth": 8,
    "base_depth": 4,
}
MODELS = [
    VIT,
    VIT | {"qk_norm": True},
    VIT | {"timm_name": "deit3_small_patch16_224", "layer_scale": 0.1},
    RESNET,
    RESNET | {"width": 64},
    RESNET | {"block": "bottleneck", "norm": "group", "num_groups": 8},
    RESNET | {"norm": "none"},
    RESNET | {"preactivation": True, "norm": "group", "num_groups": 8},
    {"family": "conv_resnet", "depth": 6, "base_depth": 3, "image_size": 8, "norm": "layer", "convs_per_branch": 2},
]


def finished_run(directory: Path, model: dict[str, Any]) -> tuple[Path, nn.Module, RunConfig]:
    """What a run leaves behind, with every weight and running statistic moved off its initial value."""
    sizes = {"width": 64, "depth": 4, "base_width": 32, "base_depth": 2, "num_classes": 10}
    config = from_plain(
        RunConfig,
        {
            "model": sizes | model,
            "parameterization": {"gamma0": 2.0, "beta": 0.8},
            "optimizer": {"lr": 1.0},
            "data": {"name": "x", "root": "x", "num_streams": 1, "mean": [0.1, 0.2, 0.3]},
            "train": {"samples": 1, "global_batch_size": 1},
        },
        "test",
    )
    network = build(config.model, config.parameterization, seed=0).network
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(
                    0.02 * torch.randn_like(tensor).abs() if tensor.min() > 0 else 0.02 * torch.randn_like(tensor)
                )
    directory.mkdir()
    (directory / "config.yaml").write_text(to_yaml(config))
    save_file(network.state_dict(), directory / "weights.safetensors")
    return directory, network.eval(), config


@pytest.mark.parametrize("model", MODELS, ids=range(len(MODELS)))
def test_timm_loads_an_export_strictly_and_computes_the_same_logits(model: dict[str, Any], tmp_path: Path) -> None:
    run, network, config = finished_run(tmp_path / "run", model)
    out = tmp_path / "out.safetensors"
    plain = export_run(run, out)
    name, arguments = plain.name, plain.arguments
    plain = timm.create_model(name, checkpoint_path=str(out), **json.loads(json.dumps(arguments))).eval()
    assert plain.load_state_dict(load_file(out), strict=True)
    images = torch.randn(4, 3, config.model.image_size, config.model.image_size)
    with torch.no_grad():
        ours, theirs = network(images), plain(images)
    assert rms(ours - theirs) <= 1e-5 * rms(ours)
    with safe_open(out, "pt") as file:
        metadata = {key: json.loads(text) for key, text in file.metadata().items() if key != "format"}
    assert metadata["timm"] == {"model_name": name, "arguments": json.loads(json.dumps(arguments))}
    assert (metadata["model"]["width"], metadata["parameterization"]["name"]) == (config.model.width, "depth_mup")
    size = config.model.image_size
    assert metadata["pretrained_cfg"].items() >= {"mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "crop_pct": 1.0}.items()
    with_its_own = timm.data.resolve_model_data_config(plain)
    assert with_its_own == {
        "input_size": [3, size, size],
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


@pytest.mark.parametrize("model", [VIT | {"qk_norm": True, "global_pool": "avg"}, *MODELS], ids=range(1 + len(MODELS)))
def test_a_folder_in_the_layout_of_hugging_face_is_loaded_by_timm_with_no_argument(
    model: dict[str, Any], tmp_path: Path
) -> None:
    run, network, config = finished_run(tmp_path / "run", model)
    result = CliRunner().invoke(cli, ["export", str(run), str(tmp_path / "shared")])
    assert result.exit_code == 0, result.output
    assert "local-dir:" in result.output
    assert sorted(file.name for file in (tmp_path / "shared").iterdir()) == ["config.json", "model.safetensors"]
    plain = timm.create_model(f"local-dir:{tmp_path / 'shared'}", pretrained=True).eval()
    size = config.model.image_size
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        assert rms(network(images) - plain(images)) <= 1e-5 * rms(network(images))
    found = timm.data.resolve_model_data_config(plain)
    assert (found["mean"], found["crop_pct"], found["input_size"][1]) == ([0.1, 0.2, 0.3], 1.0, size)


def test_the_command_prints_code_that_loads_the_file_in_a_new_process(tmp_path: Path) -> None:
    """In one for both: the first code imports nothing of ours that the second would need."""
    scripts, expected = ["import torch"], []
    for model, timm_name in ((VIT, "vit_base_patch16_224"), (RESNET, "depthmup_resnet")):
        run, network, _ = finished_run(tmp_path / timm_name, model)
        out = tmp_path / f"{timm_name}.safetensors"
        result = CliRunner().invoke(cli, ["export", str(run), str(out)])
        assert result.exit_code == 0
        code = result.output.partition("\n\n")[2]
        assert f"create_model('{timm_name}'" in code
        scripts.append(f"{code}\nprint(network.eval()(torch.ones(1, 3, 32, 32)).tolist()[0])\ndel network")
        expected.append(network(torch.ones(1, 3, 32, 32))[0].detach())
    command = [sys.executable, "-c", "\n".join(scripts)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, ours in zip(loaded, expected, strict=True):
        assert rms(ours - torch.tensor(json.loads(line))) <= 1e-5 * rms(ours)


def test_a_run_whose_configuration_was_changed_since_or_whose_weights_are_damaged_is_refused(tmp_path: Path) -> None:
    """Other multipliers would be folded into its weights."""
    run, _, config = finished_run(tmp_path / "run", VIT)
    RunDirectory(run).write_done({"outcome": "completed", "step": 1, **describe_owner(config)})
    export_run(run, tmp_path / "out.safetensors")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("name: depth_mup", "name: completep"))
    with pytest.raises(UserError, match=r"done\.json belongs to another run \(parameterization\.name: depth_mup"):
        export_run(run, tmp_path / "out.safetensors")
    (run / "config.yaml").write_text(text)
    (run / "weights.safetensors").write_bytes((run / "weights.safetensors").read_bytes()[:500])
    with pytest.raises(UserError, match=r"weights\.safetensors: not the weights of this run's model"):
        export_run(run, tmp_path / "out.safetensors")


def test_what_is_no_run_is_refused_and_a_study_names_its_best_runs(tmp_path: Path) -> None:
    out = str(tmp_path / "out.safetensors")

    def refusal() -> str:
        return str(CliRunner().invoke(cli, ["export", str(tmp_path), out]).exception)

    assert "a run writes it when it is completed" in refusal()
    (tmp_path / "study.yaml").write_text("study: {metric: minival_loss}")
    assert "export one of its runs, once one is completed" in refusal()
    for name, loss in (("worse", 2.0), ("better", 1.0)):
        (tmp_path / "runs").mkdir(exist_ok=True)
        run, _, _ = finished_run(tmp_path / "runs" / name, VIT)
        (run / "done.json").write_text(json.dumps({"outcome": "completed", "minival_loss": loss}))
    assert re.search(r"best first: \S+better \(minival_loss 1\); \S+worse", refusal())


class PostNorm(nn.Module):
    """A block whose branch ends in a norm without gain: no weight can take a multiplier up."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.fc(x))


POST_NORM_ROLES = Roles(
    parameters=(
        ParameterRule(r"0\.fc\.(weight|bias)", Role.BRANCH_HIDDEN, Init("normal", 0.1)),
        ParameterRule(r"1\.weight", Role.READOUT, Init("normal_fan_in", 1.0)),
        ParameterRule(r"1\.bias", Role.SCALAR, Init("constant", 0.0)),
    ),
    branches=(Slot(r"(\d)\.norm", r"\1.norm"),),
    readout="1",
)


def apply(network: nn.Module, roles: Roles = POST_NORM_ROLES, base_width: int = 4) -> models.ScaledModel:
    base = Size(width=base_width, depth=1)
    return models.apply(ParameterizationConfig(), network, size=Size(width=8, depth=4), base=base, roles=roles)


def post_norm() -> nn.Module:
    return nn.Sequential(PostNorm(), nn.Linear(8, 2))


def test_a_fold_that_is_impossible_names_the_module() -> None:
    with pytest.raises(ValueError, match=r"0\.norm is a LayerNorm whose output does not scale"):
        folded_state(apply(post_norm()))


def with_rules(*rules: ParameterRule) -> Roles:
    return replace(POST_NORM_ROLES, parameters=rules)


FC, READOUT, BIAS = POST_NORM_ROLES.parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"roles": with_rules()}, r"0\.fc\.weight: no rule gives it a role"),
        (
            lambda: {"roles": with_rules(FC, READOUT, BIAS, replace(FC, pattern=r"0\.fcs\.weight"))},
            r"'0\\\\.fcs\\\\.weight' matches no parameter of Sequential; nearest: 0\.fc\.weight",
        ),
        (
            lambda: {"roles": with_rules(replace(FC, pattern="0.fc("))},
            "ParameterRule.pattern: not a regular expression",
        ),
        (
            lambda: {"roles": with_rules(replace(FC, init=Init("normal_fan_in", 1.0)), READOUT, BIAS)},
            r"a branch_hidden of shape \(8,\) has no fan at base size, which Init normal_fan_in needs",
        ),
        (
            lambda: {"roles": with_rules(FC, replace(READOUT, role=Role.HIDDEN), BIAS), "base_width": 1},
            r"a hidden of shape \(2, 8\) has no fan at base size",
        ),
        (lambda: {"roles": replace(POST_NORM_ROLES, readout="2")}, "no module of Sequential is called '2'"),
        (lambda: {"roles": replace(POST_NORM_ROLES, branches=(Slot("9", "9"),))}, "no module .* matches '9'"),
        (lambda: {"roles": replace(POST_NORM_ROLES, branches=(Slot("0.norm", "fc"),))}, "is called 'fc'"),
        (lambda: {"roles": replace(POST_NORM_ROLES, branches=(Slot("0.norm", r"\1.fc"),))}, "is no template"),
    ],
    ids=range(9),
)
def test_apply_refuses_roles_that_do_not_fit_and_leaves_the_network_as_it_was(
    change: Callable[[], dict[str, Any]], message: str
) -> None:
    network = post_norm()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        apply(network, **change())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_apply_refuses_a_network_that_it_has_scaled_and_one_on_meta() -> None:
    network = post_norm()
    apply(network)
    with pytest.raises(ModelError, match="multipliers from an earlier"):
        apply(network)
    with pytest.raises(ModelError, match="this Sequential is on the meta device"), torch.device("meta"):
        apply(post_norm())


def test_apply_takes_a_network_with_an_infinite_mask() -> None:
    network = post_norm()
    network.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    assert torch.isinf(apply(network).network.get_buffer("mask")).any()


def test_the_example_of_the_page_on_your_own_model_runs_and_gives_the_tables_factors() -> None:
    page = Path(__file__).parents[1] / "docs" / "your-model.md"
    example = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, str(page), "exec"), names)
    scaled, optimizer = names["scaled"], names["optimizer"]
    assert scaled.multipliers["head"].value == 64 / 256
    assert scaled.multipliers["blocks.23.down"].value == pytest.approx((3 / 24) ** 0.5)
    lr_mult = {group["name"]: group["lr_mult"] for group in optimizer.param_groups}
    assert lr_mult["branch_hidden"] == pytest.approx((1 / 4) * (1 / 8) ** 0.5)
    x = torch.randn(16, 64)
    scaled.network(x).square().mean().backward()
    optimizer.step()
    plain = names["Net"](256, 24)
    plain.load_state_dict(folded_state(scaled))
    torch.testing.assert_close(plain(x), scaled.network(x), rtol=1e-5, atol=1e-5)

    found = find_roles(names["Net"], torch.zeros(1, 64), 64, 3).roles
    stated = names["roles"]
    parameters = [name for name, _ in plain.named_parameters()]
    by_hand, seen = match_rules(parameters, stated.parameters), match_rules(parameters, found.parameters)
    assert {name: seen[name].role for name in seen} == {name: by_hand[name].role for name in by_hand}

    assert {line.axis for line in names["lines"]} == {"width", "depth"}
    assert {"stream", "branch", "logits", "branch_hidden"} <= {line.quantity for line in names["lines"]}
    assert not names["off"]
    names["parameterization"] = ParameterizationConfig(name="sp")
    lines = check_sizes(names["build_at"], names["batch"], names["base"], names["config"], Settings((1, 4), 2, 16, 2))
    assert {line.axis for line in lines if line.verdict == "off"} == {"width", "depth"}
