"""Networks of one's own: which sizes `models.apply` refuses, and where the coordinate check finds the stream."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthmup import models
from depthmup.models import (
    Init,
    ModelError,
    OptimizerConfig,
    ParameterizationConfig,
    ParameterRule,
    Role,
    Roles,
    Size,
    Slot,
)
from depthmup.models.build import build_meta
from depthmup.models.config import ConvResNetConfig, ResNetConfig, VisionTransformerConfig
from depthmup.models.coordinate_check import Line, Settings, check_sizes
from depthmup.models.parameterization import TABLE
from depthmup.models.stream import find_stream_modules

FAN_IN, ZEROS, ONES = Init("normal_fan_in", 1.0), Init("constant", 0.0), Init("constant", 1.0)
HEADS, TOKENS = 2, 4


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.queries, self.keys = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(self.queries(q), self.keys(k), v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Both branches end inside of a module of their own: one in an attribute, one in an entry of a list."""

    def __init__(self, width: int, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        mlp = nn.Sequential(nn.Linear(width, 2 * width, bias=False), nn.ReLU(), nn.Linear(2 * width, width, bias=False))
        self.inner = nn.ModuleDict({"attn": Attention(width), "mlp": mlp})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inner["attn"](self.norms[0](x))
        return x + self.inner["mlp"](self.norms[1](x))


class Net(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width, bias=False), nn.Parameter(torch.zeros(1, TOKENS, width))
        self.body = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, 8) -> (batch, 10)
        return self.head(self.norm(self.body(self.embed(x) + self.position)).mean(1))


ROLES = Roles(
    parameters=(
        ParameterRule(r"embed\.weight", Role.INPUT, FAN_IN),
        ParameterRule(r"position", Role.INPUT, Init("normal", 0.02)),
        ParameterRule(r"body\.\d+\.inner\..*\.weight", Role.BRANCH_HIDDEN, FAN_IN),
        ParameterRule(r"body\.\d+\.norms\.\d\.weight", Role.BRANCH_VECTOR, ONES),
        ParameterRule(r"body\.\d+\.norms\.\d\.bias", Role.BRANCH_VECTOR, ZEROS),
        ParameterRule(r"norm\.weight", Role.VECTOR, ONES),
        ParameterRule(r"norm\.bias", Role.VECTOR, ZEROS),
        ParameterRule(r"head\.weight", Role.READOUT, FAN_IN),
    ),
    branches=(
        Slot(r"(body\.\d+\.inner\.attn)\.proj", r"\1.proj"),
        Slot(r"(body\.\d+\.inner\.mlp)\.2", r"\1.2"),
    ),
    readout="head",
    queries=(Slot(r"(.*)\.queries", r"\1.qkv", share=1 / 3),),
    keys=r".*\.keys",
)
BASE = Size(width=32, depth=3, head_dim=16)


def applied(
    network: nn.Module | None = None, size: Size = BASE, base: Size = BASE, roles: Roles = ROLES, seed: int = 0
) -> models.ScaledModel:
    network = network or Net(size.width, size.depth)
    beta = base.depth**-0.5
    return models.apply(ParameterizationConfig(beta=beta), network, size=size, base=base, roles=roles, seed=seed)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((16, TOKENS, 8), generator=generator), torch.randint(10, (16,), generator=generator)


# ---------------------------------------------------------------- the residual stream


@pytest.mark.parametrize("stated", [None, r"body\.\d+"])
def test_a_right_network_whose_branches_end_inside_of_modules_passes_the_check(stated: str | None) -> None:
    def build_at(size: Size, seed: int) -> models.ScaledModel:
        return applied(size=replace(size, head_dim=size.width // HEADS), roles=replace(ROLES, blocks=stated), seed=seed)

    settings = Settings(factors=(1, 4), steps=2)
    config = OptimizerConfig(lr=1e-3)
    lines = check_sizes(build_at, batch, BASE, config, settings, head_dim_grows=True)
    assert not [(line.axis, line.quantity, line.step, line.slope) for line in lines if line.verdict == "off"]
    assert {"stream", "branch"} <= {line.quantity for line in lines}


def check_behind_a_readout_of_zeros(steps: int) -> list[Line]:
    rules = (*ROLES.parameters[:-1], ParameterRule(r"head\.weight", Role.READOUT, ZEROS))

    def build_at(size: Size, seed: int) -> models.ScaledModel:
        return applied(size=size, roles=replace(ROLES, parameters=rules), seed=seed)

    settings = Settings(factors=(1, 4), steps=steps, num_seeds=2)
    return check_sizes(build_at, batch, BASE, OptimizerConfig(lr=1e-3), settings, ("depth",))


def test_a_check_in_which_a_roles_weights_never_move_is_refused_for_it_would_pass_whatever_their_rule_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ModelError, match="in 1 step of the check no weight moves whose role is branch_hidden, "):
        check_behind_a_readout_of_zeros(steps=1)
    right = check_behind_a_readout_of_zeros(steps=2)
    assert [line.quantity for line in right if line.verdict == "off"] == []
    row = replace(TABLE[Role.BRANCH_HIDDEN], lr_adam=lambda N, L, a: 1 / N)
    monkeypatch.setitem(TABLE, Role.BRANCH_HIDDEN, row)
    wrong = check_behind_a_readout_of_zeros(steps=2)
    assert "branch_hidden" in [line.quantity for line in wrong if line.verdict == "off"]


def test_blocks_are_the_modules_that_put_out_the_stream_and_looking_changes_nothing() -> None:
    class NormedBlock(Block):
        def __init__(self, width: int) -> None:
            super().__init__(width, Normalized)

    class Normalized(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    network = Net(32, 3)
    network.body[1] = NormedBlock(32)
    scaled = applied(network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert find_stream_modules(scaled, batch(0)[0]) == ["body.0", "body.1", "body.2"]
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    hooks = [hook for module in network.modules() for hook in module._forward_hooks.values()]
    assert {id(hook) for hook in hooks} == {id(scaled.multipliers[name]) for name in scaled.branches}


class WithoutBlocks(Net):
    """The network itself adds branches to the stream."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.body = nn.Sequential(*(nn.ModuleDict({"inner": Block(width).inner}) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.body:
            x = x + block["inner"]["attn"](x)
            x = x + block["inner"]["mlp"](x)
        return self.head(self.norm(x).mean(1))


def test_a_network_that_adds_branches_outside_of_modules_is_told_what_to_do() -> None:
    without_norms = tuple(rule for rule in ROLES.parameters if "norms" not in rule.pattern)
    scaled = applied(WithoutBlocks(32, 3), roles=replace(ROLES, parameters=without_norms))
    with pytest.raises(
        ModelError, match=r"no module around body\.0\.inner\.attn\.proj puts out the residual stream, .*: put"
    ):
        find_stream_modules(scaled, batch(0)[0])


def test_a_branch_outside_of_the_stated_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"the branch that ends in body\.0\.inner\.attn\.proj is in none of them"):
        applied(roles=replace(ROLES, blocks=r"body\.[12]"))


@pytest.mark.parametrize(
    ("config", "first", "count"),
    [
        (VisionTransformerConfig(width=16, depth=3, base_width=16, base_depth=3, head_dim=8), "blocks.0", 3),
        (ResNetConfig(width=16, depth=8, base_width=16, base_depth=4), "layer1.0", 8),
        (ResNetConfig(width=16, depth=8, base_width=16, base_depth=4, preactivation=True), "stages.0.blocks.0", 8),
        (ConvResNetConfig(width=16, depth=6, base_width=16, base_depth=3), "stages.0.0", 6),
    ],
)
def test_every_family_states_its_blocks(config: Any, first: str, count: int) -> None:
    blocks = build_meta(config, ParameterizationConfig()).blocks
    assert (blocks[0], len(blocks)) == (first, count)


# ---------------------------------------------------------------- what unscales a network


def test_apply_takes_a_network_whose_sizes_are_right() -> None:
    scaled = applied(size=Size(width=96, depth=2, head_dim=48))
    assert scaled.multipliers["body.0.inner.attn.queries"].value == pytest.approx(3**-0.5)
    applied(size=Size(width=16, depth=1, head_dim=8))  # smaller than its base
    applied(size=replace(BASE, width=48, head_dim=24))  # 3 / 2 times


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: {"size": Size(width=128, depth=3, head_dim=64), "roles": replace(ROLES, queries=())},
            "head_dim grows from 16 to 64, and Roles.queries names no module",
        ),
        (lambda: {"size": Size(width=128, depth=3, head_dim=64), "base": Size(width=32, depth=3)}, "state it in both"),
        (
            lambda: {"network": Net(64, 3), "size": Size(width=128, depth=3, head_dim=64)},
            "size.width is 128, .*: found",
        ),
        (lambda: {"network": Net(64, 3), "size": Size(width=32, depth=3, head_dim=16)}, "size.width is 32, .*: found"),
        (
            lambda: {"network": Net(64, 3), "size": Size(width=2, depth=3), "base": Size(width=1, depth=3)},
            "size.width is 2",
        ),
        (
            lambda: {"size": Size(width=50, depth=3, head_dim=25), "network": widened(Net(50, 3), 64)},
            r"body\.0\.inner\.mlp\.0\.weight of shape \(64, 50\) is branch_hidden, .* \(width 32 to 50\)",
        ),
        (
            lambda: {"size": Size(width=64, depth=3, head_dim=32), "network": with_temperature(Net(64, 3))},
            r"temperature of shape \(\) is vector, which grows with width, .* give it a role that does not grow",
        ),
    ],
    ids=range(7),
)
def test_apply_refuses_sizes_that_unscale_a_network(change: Callable[[], dict[str, Any]], message: str) -> None:
    arguments = change()
    if hasattr(arguments.get("network"), "temperature"):
        arguments["roles"] = replace(
            ROLES, parameters=(*ROLES.parameters, ParameterRule("temperature", Role.VECTOR, ONES))
        )
    with pytest.raises(ModelError, match=message) as error:
        applied(**arguments)
    assert "\n" not in str(error.value)


def widened(network: Net, hidden: int) -> Net:
    """Its MLPs have a width that did not grow with the rest."""
    for block in network.body:
        width = network.head.in_features
        block.inner["mlp"] = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False)
        )
    return network


def with_temperature(network: Net) -> Net:
    network.temperature = nn.Parameter(torch.ones(()))
    return network


def test_a_rule_may_spare_its_parameters_the_decay() -> None:
    spared = tuple(replace(rule, decays=rule.pattern != "position") for rule in ROLES.parameters)
    for roles, decay in ((ROLES, 0.1), (replace(ROLES, parameters=spared), 0.0)):
        scaled = applied(roles=roles)
        groups = models.parameter_groups(
            scaled.network, scaled.rules, scaled.scale, OptimizerConfig(lr=1.0, weight_decay=0.1)
        )
        position = dict(scaled.network.named_parameters())["position"]
        (group,) = (group for group in groups if any(parameter is position for parameter in group["params"]))
        assert group["weight_decay"] == decay
        assert sum(len(group["params"]) for group in groups if group["weight_decay"]) == 15 - (decay == 0)
