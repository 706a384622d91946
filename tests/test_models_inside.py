"""The coordinate check inside residual branches: what layers move by their own weights, and what they pass on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from depthmup import models
from depthmup.launch.cli import cli
from depthmup.models.build import build
from depthmup.models.check_record import Inside, Layer, Position, list_branch_layers
from depthmup.models.config import AnyModelConfig, ConvResNetConfig, ResNetConfig, VisionTransformerConfig
from depthmup.models.coordinate_check import Line, Settings, check
from depthmup.models.errors import ModelError
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization import Role
from depthmup.models.parameterization_config import ParameterizationConfig

DIGITS = {"num_classes": 10, "image_size": 8, "in_channels": 1}
VIT = VisionTransformerConfig(width=32, depth=3, base_width=32, base_depth=3, num_heads=4, patch_size=4, **DIGITS)
CONV_RESNET = ConvResNetConfig(width=32, depth=3, base_width=32, base_depth=3, **DIGITS)
SGD, ADAMW = OptimizerConfig(name="sgd", lr=0.03), OptimizerConfig(name="adamw", lr=1e-3)
INSIDE = Settings(factors=(1, 4), steps=2, num_seeds=3, inside=True)


def inside(config: AnyModelConfig, name: str, optimizer: OptimizerConfig) -> list[Line]:
    """Lines over depth of the layers inside branches, with the beta of the paper's absolute form at that alpha."""
    alpha = ParameterizationConfig(name=name).resolve().alpha
    parameterization = ParameterizationConfig(name=name, beta=config.base_depth**-alpha)
    lines = check(config, parameterization, optimizer, INSIDE, ("depth",))
    return [line for line in lines if " layer, " in line.quantity]


def test_in_a_vit_alpha_1_keeps_inner_layers_moving_and_alpha_one_half_lets_them_freeze() -> None:
    """By their own weights they move as L^(alpha - 1); the last layers are asked for no more than that."""
    good, frozen = inside(VIT, "completep", ADAMW), inside(VIT, "depth_mup", ADAMW)
    assert not [line for line in good if line.verdict == "off"]
    own = [line for line in frozen if line.quantity.startswith("inner layer, own")]
    assert {line.quantity for line in own} == {"inner layer, own 1.1", "inner layer, own 2.1"}
    assert all(line.verdict == "off" for line in own)
    assert all(line.slope == pytest.approx(-0.5, abs=0.1) for line in own)
    last = [line for line in frozen if line.quantity.startswith("last layer, own")]
    assert last
    assert not [line for line in last if line.verdict == "off"]


def test_in_branches_of_one_layer_alpha_one_half_is_right_and_of_two_it_is_not() -> None:
    two = replace(CONV_RESNET, convs_per_branch=2)
    assert not [line for line in inside(CONV_RESNET, "depth_mup", SGD) if line.verdict == "off"]
    off = [line.quantity for line in inside(two, "depth_mup", SGD) if line.verdict == "off"]
    assert "inner layer, own 1.1" in off
    assert not [line for line in inside(two, "completep", SGD) if line.verdict == "off"]


def test_layers_are_found_in_the_order_in_which_they_run() -> None:
    """Blocks and branches come from the roles: attention and MLP of a ViT, one branch of a ResNet's block."""
    vit = build(VIT, ParameterizationConfig(), seed=0)
    found = list_branch_layers(vit, torch.zeros(2, 1, 8, 8))
    assert found[:4] == [
        Layer("blocks.0.attn.qkv", 0, 1, 1, 2),
        Layer("blocks.0.attn.proj", 0, 1, 2, 2),
        Layer("blocks.0.mlp.fc1", 0, 2, 1, 2),
        Layer("blocks.0.mlp.fc2", 0, 2, 2, 2),
    ]
    assert [layer.block for layer in found] == [0] * 4 + [1] * 4 + [2] * 4
    config = ResNetConfig(
        **{"width": 16, "depth": 4, "base_width": 16, "base_depth": 4, "block": "bottleneck", "norm": "none"},
        **{"num_classes": 10, "image_size": 32, "in_channels": 1},
    )
    resnet = build(config, ParameterizationConfig(), seed=0)
    layers = list_branch_layers(resnet, torch.zeros(2, 1, 32, 32))
    assert {layer.count for layer in layers} == {3}  # the shortcut's convolution is no part of the branch
    assert [layer.name.rpartition(".")[2] for layer in layers] == ["conv1", "conv2", "conv3"] * 4


def test_the_two_parts_are_the_whole_change_of_a_layers_output() -> None:
    scaled = build(VIT, ParameterizationConfig(beta=0.3), seed=0)
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    watched = Inside(scaled, list_branch_layers(scaled, images))
    fc2 = scaled.network.get_submodule("blocks.1.mlp.fc2")
    outputs: list[Tensor] = []
    fc2.register_forward_hook(lambda module, inputs, output: outputs.append(module.forward(inputs[0]).detach()))
    scaled.network(images)
    with torch.no_grad():
        for parameter in scaled.network.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    scaled.network(images)
    changes = watched.changes()
    whole = sum(changes[f"last layer, {part} 2.2"][Position("", 1)] for part in ("own", "passed"))
    assert torch.allclose(whole, outputs[1] - outputs[0], atol=1e-5)
    watched.close()
    with torch.no_grad():
        fc2.weight.zero_()
    watched.inputs.clear()
    scaled.network(images)
    assert not watched.inputs


class Opaque(nn.Module):
    """A matrix that is applied by the module itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = Opaque(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(4, width), Block(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.stem(x)))
        return out


def test_a_branch_of_other_modules_is_refused_by_name() -> None:
    roles = models.Roles(
        parameters=(
            models.ParameterRule(r"stem\..*", Role.INPUT, models.Init("normal", 1.0)),
            models.ParameterRule(r"block\..*", Role.BRANCH_HIDDEN, models.Init("normal", 1.0)),
            models.ParameterRule(r"head\.weight", Role.READOUT, models.Init("normal", 1.0)),
            models.ParameterRule(r"head\.bias", Role.SCALAR, models.Init("constant", 0.0)),
        ),
        branches=(models.Slot("block.branch", "block.branch"),),
        readout="head",
    )
    size = models.Size(width=8, depth=1)
    scaled = models.apply(ParameterizationConfig(), Net(8), size=size, base=size, roles=roles, seed=0)
    with pytest.raises(ModelError, match=r"^block\.branch is a Opaque: the check sees inside a branch of linear"):
        list_branch_layers(scaled, torch.zeros(2, 4))


def test_the_command_says_that_inner_layers_freeze(study_file: Path, tmp_path: Path) -> None:
    two = ("model.convs_per_branch=2", "model.base_width=32", "parameterization.beta=0.577", "--axis", "depth")
    arguments = ["check", str(study_file), *two, "--factors", "1,4", "--steps", "1", "--inside"]
    said = CliRunner().invoke(cli, [*arguments, "--plot", str(tmp_path / "check.png")], catch_exceptions=False)
    assert said.exit_code == 1
    assert "inner layer, own 1.1" in said.output
    assert "as depth^-0.5 and freeze" in " ".join(said.output.split())
    assert all(len(line) <= 80 for line in said.output.splitlines() if " layer, " in line)
