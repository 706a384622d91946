"""Roles are found by looking at a network: the same as those written by hand, for networks of strangers too."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
from depthmup import models
from depthmup.models import OptimizerConfig, ParameterizationConfig, Role, Roles, Size
from depthmup.models.build import FAMILIES, build, check_own
from depthmup.models.config import AnyModelConfig, ConvResNetConfig, ResNetConfig, VisionTransformerConfig
from depthmup.models.coordinate_check import Line, Settings, check_sizes
from depthmup.models.discovery.find import find_roles
from depthmup.models.discovery.growth import Builder
from depthmup.models.errors import ModelError
from depthmup.models.family import match_rules

COMMON: dict[str, Any] = {"base_width": 16, "base_depth": 4, "num_classes": 10}
VIT = VisionTransformerConfig(family="vit", width=32, depth=2, head_dim=16, patch_size=8, image_size=16, **COMMON)
CONV_RESNET = ConvResNetConfig(width=8, depth=3, image_size=16, num_classes=10, base_width=8, base_depth=3)
RESNET = ResNetConfig(width=16, depth=4, image_size=32, num_groups=8, **COMMON)
FAMILIES_HERE: list[AnyModelConfig] = [
    VIT,
    replace(VIT, qk_norm=True, layer_scale=1e-2, class_token=False, global_pool="avg"),
    replace(VIT, head_dim=None, num_heads=4),  # the head dim grows with width
    CONV_RESNET,
    replace(CONV_RESNET, norm="batch", convs_per_branch=2),
    *(
        replace(RESNET, norm=norm, preactivation=preactivation, block=block)
        for norm, preactivation, block in (
            ("batch", False, "basic"), ("none", False, "bottleneck"),
            ("group", True, "bottleneck"), ("batch", True, "basic"),
        )
    ),
]  # fmt: skip


def builder_of(config: AnyModelConfig) -> Builder:
    def build_at(width: int, depth: int) -> nn.Module:
        sized = replace(config, width=width, depth=depth, base_width=width, base_depth=depth)
        return build(sized, ParameterizationConfig(name="sp"), seed=0).network

    return build_at


@pytest.mark.parametrize("config", FAMILIES_HERE, ids=lambda config: f"{config.family}-{config.depth}")
def test_roles_are_those_that_the_families_state_name_by_name(config: AnyModelConfig) -> None:
    inputs = torch.zeros(2, 3, config.image_size, config.image_size)
    found = find_roles(builder_of(config), inputs, config.width, config.depth)
    network = builder_of(config)(config.width, 3 * config.depth)  # deeper than any that was looked at
    names = [name for name, _ in network.named_parameters()]
    by_hand = FAMILIES[config.family].roles(replace(config, depth=3 * config.depth))
    stated, seen = match_rules(names, by_hand.parameters), match_rules(names, found.roles.parameters)
    for name, parameter in network.named_parameters():
        assert (seen[name].role, seen[name].decays) == (stated[name].role, stated[name].decays), name
        if parameter.ndim > 1:  # of a bias that is drawn, the layer's fan is not in the bias's shape
            shape = tuple(parameter.shape)
            assert seen[name].init.base_std(shape) == pytest.approx(stated[name].init.base_std(shape)), name
    assert found.roles.readout == by_hand.readout
    assert blocks(found.roles, network) == blocks(by_hand, network)
    assert count(found.roles.branches, network) == count(by_hand.branches, network)
    assert bool(found.roles.queries) == (config.family == "vit" and config.head_dim is None)


def blocks(roles: Roles, network: nn.Module) -> list[str]:
    assert roles.blocks
    return [name for name, _ in network.named_modules() if re.fullmatch(roles.blocks, name)]


def count(slots: tuple[models.Slot, ...], network: nn.Module) -> int:
    return sum(bool(re.fullmatch(slot.output, name)) for slot in slots for name, _ in network.named_modules())


def test_a_scaled_family_has_the_same_multipliers_and_weights_as_with_roles_by_hand() -> None:
    config = replace(VIT, width=64, depth=6, base_width=32, base_depth=2)
    by_hand = build(config, ParameterizationConfig(name="depth_mup"), seed=3)
    found = models.build_scaled(
        builder_of(config), size=Size(width=64, depth=6), base=Size(width=32, depth=2),
        inputs=torch.zeros(1, 3, 16, 16), seed=3,
    )  # fmt: skip
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(found.network(images), by_hand.network(images))
    optimizer = OptimizerConfig(name="adamw", lr=2**-8)
    rates = [
        sorted(group["lr"] for group in models.parameter_groups(each.network, each.rules, each.scale, optimizer))
        for each in (found, by_hand)
    ]
    assert rates[0] == rates[1]


class Mixer(nn.Module):
    """A stranger's block: gated MLP and attention side by side, torch's attention, a gain, nested modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, width // 8, batch_first=True)
        self.gated = nn.ModuleDict({"up": nn.Linear(width, 4 * width, bias=False), "down": nn.Linear(2 * width, width)})
        self.gain = nn.Parameter(torch.full((width,), 0.5))
        self.local = nn.Conv1d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        a, b = self.gated["up"](y).chunk(2, dim=-1)
        x = x + self.attention(y, y, y, need_weights=False)[0] + self.gated["down"](F.silu(a) * b) * self.gain
        return x + self.local(torch.relu(x).transpose(1, 2)).transpose(1, 2)


class Stranger(nn.Module):
    def __init__(self, width: int, depth: int, block: Callable[[int], nn.Module] = Mixer) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.position = nn.Parameter(torch.randn(1, 5, width) * 0.02)
        self.body = nn.ModuleDict({"layers": nn.ModuleList(block(width) for _ in range(depth))})
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for layer in self.body["layers"]:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


TOKENS = torch.zeros(2, 5, 12)


def test_a_strangers_network_with_parallel_branches_attention_a_gate_and_a_depthwise_conv() -> None:
    found = find_roles(Stranger, TOKENS, 16, 2).roles
    rules = match_rules((name for name, _ in Stranger(32, 5).named_parameters()), found.parameters)
    expected = {
        "embed.weight": Role.INPUT, "embed.bias": Role.VECTOR, "position": Role.INPUT,
        "norm.weight": Role.VECTOR, "head.weight": Role.READOUT, "head.bias": Role.SCALAR,
        "body.layers.4.norm.weight": Role.BRANCH_VECTOR, "body.layers.4.gain": Role.BRANCH_VECTOR,
        "body.layers.4.local.weight": Role.BRANCH_VECTOR, "body.layers.4.local.bias": Role.BRANCH_VECTOR,
        "body.layers.4.attention.in_proj_weight": Role.BRANCH_HIDDEN,
        "body.layers.4.attention.out_proj.weight": Role.BRANCH_HIDDEN,
        "body.layers.4.gated.up.weight": Role.BRANCH_HIDDEN, "body.layers.4.gated.down.weight": Role.BRANCH_HIDDEN,
        "body.layers.4.gated.down.bias": Role.BRANCH_VECTOR,
    }  # fmt: skip
    assert {name: rules[name].role for name in expected} == expected
    ends = [slot.output for slot in found.branches]
    assert [re.sub(r"\W+d\W+|\\", "", end.rpartition("d+)")[2]) for end in ends] == [
        ".attention",
        ".gated.down",
        ".local",
    ]
    assert rules["body.layers.0.gain"].init == models.Init("constant", 0.5)


class UNet(nn.Module):
    """Two scales; the outer one's features are joined to, or added to, what comes up from the inner one."""

    def __init__(self, width: int, depth: int, added: bool) -> None:
        super().__init__()
        self.stem, self.added = nn.Conv1d(3, width, 3, padding=1), added
        self.outer, self.inner, self.upper = (
            nn.Sequential(*(ConvBlock(channels) for _ in range(depth))) for channels in (width, 2 * width, width)
        )
        self.down = nn.Conv1d(width, 2 * width, 2, stride=2)
        self.up = nn.ConvTranspose1d(2 * width, width, 2, stride=2)
        self.fuse = nn.Conv1d(width if added else 2 * width, width, 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        outer = self.outer(self.stem(x))
        below = self.up(self.inner(self.down(outer)))
        return self.head(self.upper(self.fuse(outer + below if self.added else torch.cat([outer, below], 1))).mean(2))


class ConvBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, channels), nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.norm(x)))


@pytest.mark.parametrize("added", [False, True], ids=["joined", "added"])
def test_every_block_of_a_u_shaped_network_is_a_branch_and_its_shortcut_across_is_none(added: bool) -> None:
    def build_at(width: int, depth: int) -> nn.Module:
        return UNet(width, depth, added)

    found = find_roles(build_at, torch.zeros(2, 3, 8), 16, 2).roles
    rules = match_rules((name for name, _ in build_at(16, 3).named_parameters()), found.parameters)
    stages = {f"{stage}.{number}.conv.weight" for stage in ("outer", "inner", "upper") for number in range(3)}
    assert {name for name, rule in rules.items() if rule.role is Role.BRANCH_HIDDEN} == stages
    outside = {name for name, rule in rules.items() if rule.role is Role.HIDDEN}
    assert outside == {"down.weight", "up.weight", "fuse.weight"}
    assert count(found.branches, build_at(16, 3)) == 9


class DepthwiseStem(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv1d(3, width, 1), nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.blocks = nn.Sequential(*(ConvBlock(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.mix(self.embed(x)))).mean(-1))


def test_a_depthwise_convolution_outside_of_branches_is_a_vector_and_does_not_decay() -> None:
    """Its fan-in does not grow, as an input's, which decays."""
    found = find_roles(DepthwiseStem, torch.zeros(2, 3, 8), 16, 2).roles
    rules = match_rules((name for name, _ in DepthwiseStem(16, 3).named_parameters()), found.parameters)
    assert (rules["embed.weight"].role, rules["mix.weight"].role) == (Role.INPUT, Role.VECTOR)


def test_the_coordinate_check_passes_on_the_strangers_network() -> None:
    base, roles = Size(width=32, depth=4), find_roles(Stranger, TOKENS, 32, 4).roles
    parameterization = ParameterizationConfig(name="completep", beta=1 / 4)

    def build_at(size: Size, seed: int) -> models.ScaledModel:
        network = Stranger(size.width, size.depth)
        return models.apply(parameterization, network, size=size, base=base, roles=roles, seed=seed)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((16, 5, 12), generator=generator), torch.randint(10, (16,), generator=generator)

    optimizer = OptimizerConfig(name="adamw", lr=2**-9)
    lines = check_sizes(build_at, batch, base, optimizer, Settings(factors=(1, 2, 4), steps=2))
    assert len(lines) == 48
    assert [line for line in lines if line.verdict != "ok"] == []


def test_what_is_printed_can_be_pasted() -> None:
    found = find_roles(Stranger, TOKENS, 16, 2).roles
    scope: dict[str, Any] = {name: getattr(models, name) for name in ("Init", "ParameterRule", "Role", "Roles", "Slot")}
    exec(models.roles_code(found), scope)
    assert scope["roles"] == found
    check_own(Stranger(16, 2), scope["roles"])
    table = models.roles_table(found)
    assert re.search(r"layers\\.\\d\+\\.gain +branch_vector +constant 0.5", table)


class Block(nn.Module):
    def __init__(self, width: int, end: str = "") -> None:
        super().__init__()
        self.end = end
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        if end == "narrow":
            self.down = nn.Linear(8, width)
            self.up = nn.Linear(width, 8)
        if end == "einsum":
            self.mix = nn.Parameter(torch.randn(4, width))
        if end in ("heads", "heads by einsum"):
            self.qkv = nn.Linear(width, 3 * width)
        if end == "torch's heads":
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x)))
        if self.end == "no stream":
            return y
        if self.end == "two nonlinear":
            return torch.relu(self.down(torch.relu(self.up(x)))) + torch.tanh(y)
        if self.end == "data":
            return x + y if float(x.sum()) > 0 else x
        if self.end == "einsum":
            return x + torch.einsum("bw,hw->bh", y, self.mix) @ self.mix
        if self.end == "sine":
            return x + torch.sin(y)
        if self.end == "heads":
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return x + y + F.scaled_dot_product_attention(q, k, v)
        if self.end == "heads by einsum":
            q, k, v = (each.unflatten(-1, (2, -1)) for each in self.qkv(x).chunk(3, dim=-1))
            return x + y + torch.einsum("iha,jha->hij", q, k).softmax(-1).mean(0) @ v.flatten(1)
        if self.end == "torch's heads":
            return x + y + self.attention(x, x, x)[0]
        return x + y


class Net(nn.Module):
    def __init__(self, width: int, depth: int, end: str = "", change: Callable[["Net"], None] | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(Block(width, end) for _ in range(depth))
        if change:
            change(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TwoHeads(Net):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.other = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), self.other(self.embed(x))], dim=-1)


class Prototypes(nn.Module):
    """A classifier by cosines, to whose logits the size of features does not matter; or of its weights alone."""

    def __init__(self, width: int, features: bool) -> None:
        super().__init__()
        self.weight, self.features = nn.Parameter(torch.randn(10, width)), features

    def forward(self, x: Tensor) -> Tensor:
        if self.features:
            return F.linear(F.normalize(x, dim=-1), self.weight)
        return F.linear(x, F.normalize(self.weight, dim=-1))


class Bare(Net):
    """Its readout is a parameter of the network itself."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.head, self.classes = nn.Identity(), nn.Parameter(torch.randn(10, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(x), self.classes)


class Faded(Net):
    """After each block a gate fades the stream itself."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.gates = nn.ModuleList(nn.Linear(width, 1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block, gate in zip(self.blocks, self.gates, strict=True):
            x = block(x)
            x = x * torch.sigmoid(gate(x))
        return self.head(x)


class Averaged(Net):
    """Two readouts of the same features, as one for distillation."""

    def __init__(self, width: int, depth: int, join: str = "sum") -> None:
        super().__init__(width, depth)
        self.other, self.join = nn.Linear(width, 10), join

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        left, right = self.head(x), self.other(x)
        if self.join == "product":
            return left * right
        return torch.stack([left, right]).mean(0) if self.join == "mean" else (left + right) / 2


def shared(net: Net) -> None:
    for block in net.blocks[1:]:
        block.up = net.blocks[0].up


def grown(net: Net) -> None:
    net.blocks[0].up.bias = nn.Parameter(torch.zeros(2 * net.embed.out_features))
    net.positions = nn.Parameter(torch.zeros(len(net.blocks), 3))


def odd(net: Net) -> None:
    net.embed.extra = nn.Parameter(torch.zeros(net.embed.out_features + 4))


def infinite(net: Net) -> None:
    nn.init.constant_(net.embed.bias, math.inf)


def imaginary(net: Net) -> None:
    net.turn = nn.Parameter(torch.zeros(net.embed.out_features, dtype=torch.complex64))


def normed(net: Net) -> None:
    for block in net.blocks:
        nn.utils.parametrizations.weight_norm(block.up)


class Transposed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(width, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :, None])[:, :, 0]


COUNTER = itertools.cycle((0, 1, 1, 2))
BAD: dict[str, tuple[Builder, str]] = {
    "ignores its width": (lambda width, depth: Net(16, depth), "ignores its width: .*Let layers have it"),
    "ignores its depth": (lambda width, depth: Net(width, 3), "ignores its depth, .*Let it have as many blocks"),
    "no stream": (lambda width, depth: Net(width, depth, "no stream"), "no residual stream: .*width alone"),
    "neither addend": (lambda width, depth: Net(width, depth, "two nonlinear"), "neither addend alone"),
    "depends on data": (
        lambda width, depth: Net(width, depth, "data"),
        r"traced without data, in blocks\.0, as where its control flow depends on",
    ),
    "no module at the end": (lambda width, depth: Net(width, depth, "sine"), "end it in a torch.nn.Identity"),
    "queries in a slice": (lambda width, depth: Net(width, depth, "heads"), "no module puts out the queries"),
    "queries by einsum": (lambda width, depth: Net(width, depth, "heads by einsum"), r"head dim grows .*\(8 to 16\)"),
    "queries of torch's attention": (
        lambda width, depth: Net(width, depth, "torch's heads"),
        r"head dim grows .*\(8 to 16\) in blocks\.0\.attention",
    ),
    "a transposed readout": (
        lambda width, depth: Net(width, depth, change=lambda net: setattr(net, "head", Transposed(width))),
        r"head\.conv\.weight grows in one dimension, and conv_transpose1d has no rule for that",
    ),
    "a product that is not clear": (
        lambda width, depth: Net(width, depth, "einsum"),
        "mix reads the width in one place, and puts it out",
    ),
    "two readouts": (TwoHeads, "2 readouts: head.weight, other.weight"),
    "two readouts that gate each other": (
        lambda width, depth: Averaged(width, depth, "product"),
        "2 readouts: head.weight, other.weight",
    ),
    "a readout of normalised features": (
        lambda width, depth: Net(width, depth, change=lambda net: setattr(net, "head", Prototypes(width, True))),
        r"the readout head\.weight is not the weight of a module that multiplies .* plain torch\.nn\.Linear",
    ),
    "a readout of normalised weights": (
        lambda width, depth: Net(width, depth, change=lambda net: setattr(net, "head", Prototypes(width, False))),
        r"the readout head\.weight is not the weight of a module that multiplies",
    ),
    "a readout without a module": (Bare, r"the readout classes is not the weight of a module that multiplies"),
    "a gate of the stream in every block": (Faded, r"gates\.0\.weight reads the width outside of residual branches"),
    "a base without the blocks that follow": (
        lambda width, depth: Mobile(width, depth - 2),
        r"branches in modules like .*b.*, and the base none, .*: take a base of more blocks",
    ),
    "shared weights": (lambda width, depth: Net(width, depth, change=shared), "are one parameter"),
    "grows with depth": (lambda width, depth: Net(width, depth, change=grown), "positions .* grows with depth"),
    "grows oddly": (lambda width, depth: Net(width, depth, change=odd), r"extra is of shape \(20,\).* \(36,\)"),
    "unused": (
        lambda width, depth: Net(width, depth, change=lambda net: setattr(net, "idle", nn.Linear(3, 3))),
        "does not use idle.weight",
    ),
    "frozen": (
        lambda width, depth: Net(width, depth, change=lambda net: net.embed.requires_grad_(False) and None),
        r"embed\.weight is frozen, and all initial weights are drawn anew: make it a buffer",
    ),
    "complex": (lambda width, depth: Net(width, depth, change=imaginary), "turn is torch.complex64, for which"),
    "weight norm": (
        lambda width, depth: Net(width, depth, change=normed),
        r"a weight of blocks\.0\.up is computed from",
    ),
    "spectral norm": (
        lambda width, depth: Net(
            width, depth, change=lambda net: setattr(net, "head", nn.utils.spectral_norm(nn.Linear(width, 10)))
        ),
        "a weight of head is computed from others",
    ),
    "without numbers": (
        lambda width, depth: Net(
            width, depth, change=lambda net: setattr(net, "none", nn.Parameter(torch.empty(0, 3)))
        ),
        r"none has no numbers, its shape being \(0, 3\): leave it out",
    ),
    "not finite": (
        lambda width, depth: Net(width, depth, change=infinite),
        r"embed\.bias starts with numbers that are not finite: give it an init",
    ),
    "another network each time": (
        lambda width, depth: Net(width, depth + next(COUNTER)),
        "the builder gives another Net each time",
    ),
    "lazy": (
        lambda width, depth: Net(width, depth, change=lambda net: setattr(net, "head", nn.LazyLinear(10))),
        "head.weight has no shape before the first forward pass: give its module its sizes",
    ),
    "sizes in the other order": (
        lambda depth, width: Net(width, depth),
        r"blocks\.16\..* takes \(width, depth\) in this",
    ),
    "no arguments": (lambda: Net(16, 2), r"the builder must take \(width, depth\), two numbers"),  # type: ignore[dict-item,misc]
    "no module": (lambda width, depth: None, "a NoneType and no torch.nn.Module"),  # type: ignore[arg-type,return-value]
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_decided_is_refused_by_name(case: str) -> None:
    builder, words = BAD[case]
    with pytest.raises(ModelError, match=words):
        find_roles(builder, torch.zeros(2, 12), 16, 2)


def test_finding_the_roles_leaves_nothing_on_a_network_that_the_builder_gave() -> None:
    given: list[nn.Module] = []

    def build_at(width: int, depth: int) -> nn.Module:
        given.append(Net(width, depth))
        return given[-1]

    find_roles(build_at, torch.zeros(2, 12), 16, 2)
    assert len(given) == 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for net in given for module in net.modules())


class Ends(nn.Module):
    """Its last block has a gain that the others lack; blocks of two kinds stand in one list."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.blocks[-1].gain = nn.LayerNorm(width)
        middle = depth // 2
        self.blocks[middle].up, self.blocks[middle].down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.blocks[-1].gain(x))


def test_blocks_of_another_shape_may_move_with_depth() -> None:
    rules = match_rules(
        ["blocks.7.up.weight", "blocks.9.gain.weight"], find_roles(Ends, torch.zeros(2, 12), 16, 4).roles.parameters
    )
    assert rules["blocks.7.up.weight"].role is Role.BRANCH_HIDDEN
    assert rules["blocks.9.gain.weight"].role is Role.VECTOR


class Mobile(nn.Module):
    """As in MobileNets: the first block has no shortcut; blocks are named by a letter and a number."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, width), nn.Linear(width, 10)
        for number in range(depth + 1):
            self.add_module(f"b{number}", Block(width, "" if number else "no stream"))
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for number in range(self.depth + 1):
            x = self.get_submodule(f"b{number}")(x)
        return self.head(x)


def test_a_first_block_without_shortcut_is_outside_of_branches() -> None:
    roles = find_roles(Mobile, torch.zeros(2, 12), 16, 2).roles
    rules = match_rules([name for name, _ in Mobile(32, 12).named_parameters()], roles.parameters)
    assert rules["b0.up.weight"].role is Role.HIDDEN
    assert {rules[f"b{number}.up.weight"].role for number in range(1, 13)} == {Role.BRANCH_HIDDEN}
    assert blocks(roles, Mobile(32, 12)) == [f"b{number}" for number in range(1, 13)]
    assert count(roles.branches, Mobile(32, 12)) == 12


class ClassAttention(Net):
    """A fixed number of blocks after those that grow with depth."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.last = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in (*self.blocks, *self.last):
            x = block(x)
        return self.head(x)


def test_a_fixed_number_of_branches_has_no_factor_of_depth() -> None:
    roles = find_roles(ClassAttention, torch.zeros(2, 12), 16, 2).roles
    rules = match_rules(["blocks.5.up.weight", "last.1.up.weight"], roles.parameters)
    assert rules["blocks.5.up.weight"].role is Role.BRANCH_HIDDEN
    assert rules["last.1.up.weight"].role is Role.HIDDEN
    assert count(roles.branches, ClassAttention(16, 5)) == 5


class Parallel(Block):
    """Two linear maps side by side, as of a layer that is merged after training, and a branch whose end is a part."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x) + self.up(2 * x)
        padded = F.pad(torch.relu(y), (0, 0, 0, 1))
        return x + self.down(padded)[:, : x.shape[1]]


def test_parallel_linear_maps_are_no_branch_and_a_part_of_a_modules_output_ends_one() -> None:
    roles = find_roles(lambda width, depth: Stranger(width, depth, Parallel), TOKENS, 16, 2).roles
    assert [slot.last for slot in roles.branches] == [r"\1.down"]


def test_an_init_by_fans_with_a_gain_of_its_own_is_found() -> None:
    def build(width: int, depth: int) -> nn.Module:
        net = Ends(width, depth)
        for block in net.blocks:
            for layer in (block.up, block.down):
                nn.init.normal_(layer.weight, std=0.37 * layer.in_features**-0.5)
        return net

    rules = match_rules(["blocks.0.down.weight"], find_roles(build, torch.zeros(2, 12), 32, 4).roles.parameters)
    init = rules["blocks.0.down.weight"].init
    assert init.kind == "normal_fan_in"
    assert init.scale == pytest.approx(0.37, rel=0.05)


def test_a_matrix_in_a_branch_that_reads_the_width_and_puts_out_what_stays_is_an_output() -> None:
    roles = find_roles(lambda width, depth: Net(width, depth, "narrow"), torch.zeros(2, 12), 16, 2).roles
    rules = match_rules(["blocks.5.up.weight", "blocks.5.down.weight"], roles.parameters)
    assert rules["blocks.5.up.weight"].role is Role.ROUTER
    assert rules["blocks.5.down.weight"].role is Role.BRANCH_VECTOR


class Standardised(Block):
    """Its weight is standardised before it is used, with a gain for each row; a gate is a matrix product with a
    parameter; the branch is a sum of what two modules put out, scaled by parts of one parameter."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.weight, self.gain = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.ones(width, 1))
        self.gate, self.scales = nn.Parameter(torch.randn(width, 1)), nn.Parameter(torch.ones(2, width))
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean(1, keepdim=True)) * self.gain
        y = F.linear(x * self.scales[0], weight) * torch.sigmoid(x @ self.gate)
        x = x + (self.left(y) + self.right(torch.relu(y)))
        return x + self.down(torch.relu(self.up(x * self.scales[1])))


def test_what_is_made_of_parameters_alone_has_the_role_of_the_operation_that_takes_it() -> None:
    def build(width: int, depth: int) -> nn.Module:
        return Stranger(width, depth, Standardised)

    roles = find_roles(build, TOKENS, 16, 2).roles
    network = build(32, 5)
    rules = match_rules([name for name, _ in network.named_parameters()], roles.parameters)
    block = "body.layers.4"
    assert rules[f"{block}.weight"].role is Role.BRANCH_HIDDEN
    assert rules[f"{block}.gain"].role is Role.BRANCH_VECTOR
    assert rules[f"{block}.gate"].role is Role.ROUTER
    assert rules[f"{block}.scales"].role is Role.BRANCH_VECTOR
    assert count(roles.branches, network) == 5 * 3
    scaled = models.build_scaled(build, size=Size(width=64, depth=2), base=Size(width=16, depth=2), inputs=TOKENS)
    assert scaled.rules["body.layers.0.gate"].role is Role.ROUTER  # (width, 1): a ratio of 4 divides one of its sides


def test_the_small_init_of_a_bias_of_few_numbers_is_not_taken_for_a_large_one() -> None:
    def build(width: int, depth: int) -> nn.Module:
        net = Net(width, depth)
        with torch.no_grad():
            net.head.bias.normal_()
            net.head.bias *= 0.128 / net.head.bias.square().mean().sqrt()
        return net

    rules = match_rules(["head.bias"], find_roles(build, torch.zeros(2, 12), 16, 2).roles.parameters)
    assert rules["head.bias"].init.base_std((10,)) == pytest.approx(0.128, abs=0.001)


def test_glorots_init_of_blocks_of_several_shapes_is_found() -> None:
    def build(width: int, depth: int) -> nn.Module:
        net = Ends(width, depth)
        for block in net.blocks:
            for layer in (block.up, block.down):
                nn.init.xavier_normal_(layer.weight)
        return net

    rules = match_rules(["blocks.0.down.weight"], find_roles(build, torch.zeros(2, 12), 32, 4).roles.parameters)
    assert rules["blocks.0.down.weight"].init == models.Init("normal_fan_avg", 1.0)


class Pooled(Stranger):
    """Its readout reads a mean of tokens, weighted by scores that a layer, or a learned query, reads from the width."""

    def __init__(self, width: int, depth: int, scores: str = "layer") -> None:
        super().__init__(width, depth)
        self.scores = scores
        self.hidden = nn.Linear(width, width)
        shape = (1, 1, width) if scores == "query" else (width,)
        self.score = nn.Linear(width, 1) if scores == "layer" else nn.Parameter(torch.randn(shape) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for layer in self.body["layers"]:
            x = layer(x)
        x = self.norm(x)
        read = torch.tanh(self.hidden(x))
        if self.scores == "layer":
            scores = self.score(read)
        elif self.scores == "query":
            scores = (self.score @ read.mT).mT
        elif self.scores == "sum":
            scores = (read * self.score).sum(-1, keepdim=True)
        elif self.scores == "mean":
            scores = (read * self.score).mean(dim=-1, keepdim=True)
        else:
            scores = torch.einsum("btd,d->bt", read, self.score)[..., None]
        return self.head((scores.softmax(1) * x).sum(1))


def test_a_mean_of_a_weighted_width_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="score weighs the width, and the mean over it is taken: take the sum"):
        find_roles(lambda width, depth: Pooled(width, depth, "mean"), TOKENS, 16, 2)


@pytest.mark.parametrize("scores", ["layer", "query", "vector", "sum"])
def test_the_scores_of_attention_pooling_are_a_gate_and_pass_the_check(scores: str) -> None:
    def build(width: int, depth: int) -> nn.Module:
        return Pooled(width, depth, scores)

    roles = find_roles(build, TOKENS, 16, 2).roles
    rules = match_rules([name for name, _ in build(32, 5).named_parameters()], roles.parameters)
    found = {name: rule.role for name, rule in rules.items() if "body" not in name}
    gate = {"score.weight": Role.GATE, "score.bias": Role.SCALAR} if scores == "layer" else {"score": Role.GATE}
    assert roles.readouts == ("head",)
    assert found == gate | {
        "embed.weight": Role.INPUT, "embed.bias": Role.VECTOR, "position": Role.INPUT, "norm.weight": Role.VECTOR,
        "norm.bias": Role.VECTOR, "hidden.weight": Role.HIDDEN, "hidden.bias": Role.VECTOR, "head.weight": Role.READOUT,
        "head.bias": Role.SCALAR,
    }  # fmt: skip
    base = Size(width=16, depth=2)

    def build_at(size: Size, seed: int) -> models.ScaledModel:
        completep = ParameterizationConfig(name="completep", beta=1 / 6)
        return models.build_scaled(build, size=size, base=base, inputs=TOKENS, parameterization=completep, seed=seed)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((8, 5, 12), generator=generator), torch.arange(8) % 10

    lines = check_sizes(build_at, batch, base, OptimizerConfig(name="adamw", lr=1e-3), Settings((1, 4), steps=2))
    assert "gate" in {line.quantity for line in lines}
    assert [line for line in lines if line.verdict != "ok"] == []


class Attention(nn.Module):
    """Two heads, whose size grows with the width."""

    def __init__(self, width: int, scaling: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.scaling, self.scale = scaling, (width // 2) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.scaling.startswith("torch"):
            scale = self.scale**2 if self.scaling == "torch's, by 1 / d" else None
            mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
        elif self.scaling == "before":
            mixed = ((self.scale * q) @ k.mT).softmax(-1) @ v
        elif self.scaling == "after":
            mixed = (q @ k.mT / (1 / self.scale)).softmax(-1) @ v
        else:
            mixed = (q @ k.mT).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Attending(Stranger):
    def __init__(self, width: int, depth: int, scaling: str) -> None:
        super().__init__(width, depth, lambda width: Attention(width, scaling))


@pytest.mark.parametrize("scaling", ["before", "after", "torch's"])
def test_attention_that_divides_by_the_root_of_its_growing_head_dim_is_scaled_at_its_queries(scaling: str) -> None:
    found = find_roles(lambda width, depth: Attending(width, depth, scaling), TOKENS, 16, 2)
    assert count(found.roles.queries, Attending(32, 5, scaling)) == 5


@pytest.mark.parametrize(("scaling", "numbers"), [("none", "1 and 1"), ("torch's, by 1 / d", "0.125 and 0.0625")])
def test_attention_that_divides_otherwise_is_refused_where_its_head_dim_grows(scaling: str, numbers: str) -> None:
    said = rf"head dim grows with width \(8 to 16\) in body.layers.0, .* multiplied by {numbers}, not by 1 / sqrt"
    with pytest.raises(ModelError, match=said):
        find_roles(lambda width, depth: Attending(width, depth, scaling), TOKENS, 16, 2)


@pytest.mark.parametrize("join", ["sum", "mean"])
def test_readouts_whose_outputs_are_added_are_scaled_as_one(join: str) -> None:
    def build_at(width: int, depth: int) -> nn.Module:
        return Averaged(width, depth, join)

    inputs = torch.randn(2, 12)
    scaled = models.build_scaled(build_at, size=Size(width=64, depth=2), base=Size(width=16, depth=2), inputs=inputs)
    assert set(scaled.roles.readouts) == {"head", "other"}
    assert {name: scaled.multipliers[name].value for name in scaled.roles.readouts} == {"head": 1 / 4, "other": 1 / 4}
    assert {scaled.rules[f"{name}.weight"].role for name in scaled.roles.readouts} == {Role.READOUT}
    scope: dict[str, Any] = {name: getattr(models, name) for name in ("Init", "ParameterRule", "Role", "Roles", "Slot")}
    exec(models.roles_code(scaled.roles), scope)
    assert scope["roles"] == scaled.roles


class Gain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Turns(Net):
    """Blocks of two kinds take turns, as of attention within windows and over all: every second branch is a hundred
    times smaller."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        for number, block in enumerate(self.blocks):
            block.down = nn.Sequential(block.down, Gain(width) if number % 2 else nn.Identity())


def check_depth(kind: type[Net], quantity: str) -> Line:
    """Of completep over depth 2 to 8: the line of `quantity` at step 0."""
    base, roles = Size(width=16, depth=2), find_roles(kind, torch.zeros(2, 12), 16, 2).roles

    def build_at(size: Size, seed: int) -> models.ScaledModel:
        completep, network = ParameterizationConfig(name="completep", beta=0.5), kind(size.width, size.depth)
        return models.apply(completep, network, size=size, base=base, roles=roles, seed=seed)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((16, 12), generator=generator), torch.randint(10, (16,), generator=generator)

    optimizer, settings = OptimizerConfig(name="adamw", lr=2**-9), Settings(factors=(1, 4), steps=1, num_seeds=2)
    lines = check_sizes(build_at, batch, base, optimizer, settings, axes=("depth",))
    (at_first,) = [line for line in lines if line.quantity == quantity and line.step == 0]
    return at_first


def test_blocks_that_take_turns_are_compared_with_blocks_of_their_own_kind() -> None:
    assert check_depth(Turns, "branch").slope == pytest.approx(-1, abs=0.25)


class Placed(Net):
    """A constant is added to the stream behind the first block, at every depth."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.embed(x)) + 3
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(x)


def test_the_stream_is_compared_on_the_same_side_of_what_is_added_to_it_once() -> None:
    assert check_depth(Placed, "stream").slope == pytest.approx(0, abs=0.25)


class LinearOfAnother(torch.autograd.Function):
    """As DeepSpeed's for ZeRO 3, which it leaves in torch.nn.functional."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = x.matmul(weight.t())
        return y if bias is None else y + bias

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        raise NotImplementedError


def test_a_linear_that_another_library_put_in_the_place_of_torchs_hides_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = find_roles(Stranger, TOKENS, 16, 2)
    monkeypatch.setattr(F, "linear", LinearOfAnother.apply)
    assert find_roles(Stranger, TOKENS, 16, 2) == expected
    assert F.linear == LinearOfAnother.apply


def test_a_slot_whose_branches_end_after_different_layers_folds_into_none_of_them() -> None:
    class Ending(nn.Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(12, width), nn.Linear(width, 10)
            self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
            for block in self.blocks:
                block.drop = nn.Identity()
            self.blocks[-1].other = nn.Linear(width, width)  # in the place of `down`

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                y = block.up(x)
                y = block.other(block.down(y)) if hasattr(block, "other") else block.down(torch.relu(y))
                x = x + block.drop(y)
            return self.head(x)

    roles = find_roles(Ending, torch.zeros(2, 12), 16, 2).roles
    (slot,) = roles.branches
    assert slot.last_before("blocks.7.drop") == "blocks.7.drop"


class Narrow(nn.Module):
    """A block that reads `inputs` features, and has a shortcut of its own where it puts out another number."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.local, self.mix = nn.Conv1d(inputs, inputs, 3, padding=1, groups=inputs), nn.Conv1d(inputs, width, 1)
        self.shortcut = nn.Conv1d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.mix(self.local(torch.relu(x)))


class FixedStem(nn.Module):
    """As Xception: the first block reads a stem that does not grow."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv1d(5, 6, 1)
        self.blocks = nn.ModuleList([Narrow(6, width), *(Narrow(width, width) for _ in range(depth))])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(-1))


def test_a_first_block_that_reads_a_fixed_stem_has_roles_of_its_own() -> None:
    found = find_roles(FixedStem, TOKENS, 16, 2).roles
    network = FixedStem(32, 5)
    rules = match_rules((name for name, _ in network.named_parameters()), found.parameters)
    expected = {
        "stem.weight": Role.SCALAR, "blocks.0.shortcut.weight": Role.INPUT,
        "blocks.0.local.weight": Role.BRANCH_SCALAR, "blocks.0.mix.weight": Role.BRANCH_VECTOR,
        "blocks.1.local.weight": Role.BRANCH_VECTOR, "blocks.1.mix.weight": Role.BRANCH_HIDDEN,
        "blocks.5.local.weight": Role.BRANCH_VECTOR, "blocks.5.mix.weight": Role.BRANCH_HIDDEN,
    }  # fmt: skip
    assert {name: rules[name].role for name in expected} == expected
