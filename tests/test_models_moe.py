"""A mixture of experts is a dense ViT where there is one expert, keeps its rules over four axes, and stays balanced."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
import timm

from depthmup.launch.scale import describe_differences, list_task_values
from depthmup.models import ParameterizationConfig, coordinate_check
from depthmup.models import parameterization as rules
from depthmup.models.build import build, build_meta
from depthmup.models.config import MixtureVitConfig, VisionTransformerConfig
from depthmup.models.coordinate_check import (
    AXES,
    BAND,
    EXPERT_AXES,
    Axis,
    Settings,
    check,
    draw_fixed_batch,
)
from depthmup.models.errors import ModelError
from depthmup.models.export import folded_state
from depthmup.models.flops import count_forward_flops
from depthmup.models.moe_vit import GroupedLinear, MixtureOfExperts
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization import Role
from depthmup.models.timm_registry import find_timm_call
from depthmup.train import expert_load
from depthmup.train.expert_load import balance_experts, describe_imbalance, load_metrics
from depthmup.train.loop import run
from depthmup.train.packs.packing import list_obstacles
from train_configs import losses, pack_digits, run_config

SHAPE: dict[str, Any] = {"patch_size": 4, "num_classes": 10, "image_size": 8, "in_channels": 1}
SIZE: dict[str, Any] = {"width": 32, "depth": 3, "base_width": 32, "base_depth": 3, "head_dim": 8}
DENSE = MixtureVitConfig(**SIZE, **SHAPE, class_token=False, global_pool="avg")
MOE = replace(DENSE, num_experts=4, base_num_experts=4, active_share=0.5, mlp_ratio=2.0, base_mlp_ratio=2.0)
COMPLETEP, ADAMW = ParameterizationConfig(name="completep", beta=1 / 3), OptimizerConfig(name="adamw", lr=1e-3)
SGD = OptimizerConfig(name="sgd", lr=0.03)


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def mixture(experts: int = 4, active: int = 2, rate: float = 0.02) -> MixtureOfExperts:
    torch.manual_seed(0)
    module = MixtureOfExperts(8, 16, experts, active, rate)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def test_one_expert_is_timms_dense_vit() -> None:
    scaled = build(DENSE, COMPLETEP, seed=0)
    name, arguments = find_timm_call(VisionTransformerConfig(**SIZE, **SHAPE, class_token=False, global_pool="avg"))
    plain = timm.create_model(name, **arguments)
    state = {key: tensor for key, tensor in scaled.network.state_dict().items() if ".mlp." not in key}
    for number, block in enumerate(scaled.network.blocks):
        state[f"blocks.{number}.mlp.fc1.weight"] = block.mlp.up.weight[0]
        state[f"blocks.{number}.mlp.fc2.weight"] = block.mlp.down.weight[0]
        state[f"blocks.{number}.mlp.fc1.bias"] = torch.zeros(128)
        state[f"blocks.{number}.mlp.fc2.bias"] = torch.zeros(32)
    plain.load_state_dict(state)
    scaled = build(DENSE, ParameterizationConfig(name="completep"), seed=0)
    images = seeded(2, 1, 8, 8)
    torch.testing.assert_close(scaled.network(images), plain(images))


def test_each_token_is_the_mean_over_its_experts() -> None:
    module, x = mixture(), seeded(2, 5, 8)
    module.balance.copy_(torch.tensor([0.3, 0.0, -0.3, 0.1]))
    assert module.router is not None
    expected = torch.zeros(10, 8)
    for row, token in enumerate(x.flatten(0, 1)):
        gates = module.router(token).sigmoid()
        for expert in (gates + module.balance).topk(2).indices.tolist():
            hidden = F.gelu(module.up.weight[expert] @ token)
            expected[row] += gates[expert] * (module.down.weight[expert] @ hidden)
    torch.testing.assert_close(module(x), expected.view(2, 5, 8))


def test_no_token_is_dropped_however_skewed_the_routing() -> None:
    module = mixture()
    module.balance.copy_(torch.tensor([9.0, 8.0, 0.0, 0.0]))
    module(seeded(2, 5, 8)).sum().backward()
    assert module.load.tolist() == [10, 10, 0, 0]
    assert module.up.weight.grad is not None
    assert module.up.weight.grad.abs().sum((1, 2)).gt(0).tolist() == [True, True, False, False]


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped matrix product")
def test_torchs_grouped_product_gives_the_same() -> None:
    layer, rows, ends = GroupedLinear(3, 16, 8), seeded(12, 16), torch.tensor([5, 5, 12])
    torch.nn.init.normal_(layer.weight)
    weight = layer.weight.to(torch.bfloat16).transpose(1, 2)
    grouped = F.grouped_mm(rows.to(torch.bfloat16), weight, offs=ends.int())
    torch.testing.assert_close(grouped.float(), layer(rows, ends), rtol=0.03, atol=0.1)


def test_the_cost_is_that_of_the_active_experts() -> None:
    dense, sparse = (count_forward_flops(build_meta(c, COMPLETEP).network, (1, 8, 8)) for c in (DENSE, MOE))
    router = 2 * 3 * 4 * 32 * 4  # blocks, tokens, width, experts
    assert sparse == dense + router


# ---------------------------------------------------------------- rules


# fmt: off
LITERAL = {  # at 4 times the width, 9 times the depth, twice the experts, and twice their width over the network's
    # role:          init std,   lr of SGD, lr of AdamW, eps of AdamW, decay of AdamW
    "sp": {
        "router":      (1 / 2,     1,         1,           1,            1),
        "expert_up":   (1 / 2,     1,         1,           1,            1),
        "expert_down": (8**-0.5,   1,         1,           1,            1),
    },
    "mup": {
        "router":      (1 / 4,     1 / 2,     1 / 4,       1,            4),
        "expert_up":   (1 / 2,     4,         1 / 4,       1,            4),
        "expert_down": (1 / 4,     1,         1 / 8,       1,            8),
    },
    "depth_mup": {
        "router":      (1 / 4,     1 / 2,     1 / 12,      1 / 6,        4),
        "expert_up":   (1 / 2,     4,         1 / 12,      1 / 48,       4),
        "expert_down": (1 / 4,     1,         1 / 24,      1 / 24,       8),
    },
    "completep": {
        "router":      (1 / 4,     9 / 2,     1 / 4,       1 / 18,       4),
        "expert_up":   (1 / 2,     36,        1 / 4,       1 / 144,      4),
        "expert_down": (1 / 4,     9,         1 / 8,       1 / 72,       8),
    },
}
# fmt: on


@pytest.mark.parametrize("name", LITERAL)
def test_every_cell_of_the_mixtures_table_is_the_papers_number(name: str) -> None:
    larger = replace(MOE, width=4 * 32, depth=9 * 3, num_experts=2 * 4, mlp_ratio=2 * 2.0)
    scale = build_meta(larger, ParameterizationConfig(name=name)).scale
    for role, expected in LITERAL[name].items():
        sgd, adam = (scale.factors(Role(role), optimizer) for optimizer in ("sgd", "adamw"))
        std = math.sqrt(scale.init_variance(Role(role)))
        assert (std, sgd.lr, adam.lr, adam.eps, adam.weight_decay) == pytest.approx(expected), role
        assert sgd.weight_decay == pytest.approx(1 / sgd.lr), role


def off(
    optimizer: OptimizerConfig, axes: tuple[Axis, ...], parameterization: ParameterizationConfig = COMPLETEP
) -> set[str]:
    lines = check(MOE, parameterization, optimizer, Settings((1, 4), steps=1, num_seeds=2), axes)
    assert {line.axis for line in lines} == set(axes)
    return {f"{line.axis} {line.quantity}" for line in lines if line.verdict == "off"}


def test_the_check_passes_over_width_depth_and_both_axes_of_the_experts() -> None:
    assert off(ADAMW, AXES + EXPERT_AXES) == set()


def test_the_check_refuses_a_size_that_no_mixture_has_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinate_check, "measure", None)
    from_dense = replace(MOE, num_experts=4, base_num_experts=1, active_share=0.25)
    with pytest.raises(ModelError, match=r"of num_experts 2, 2 times the base's: .* another model\.base_num_experts"):
        check(from_dense, COMPLETEP, ADAMW, Settings((1, 2)), ("width", "num_experts"))


def test_under_sgd_each_role_of_the_mixture_moves_as_it_should() -> None:
    roles = {Role.ROUTER.value, Role.EXPERT_UP.value, Role.EXPERT_DOWN.value}
    assert not [each for each in off(SGD, AXES + EXPERT_AXES) if each.partition(" ")[2] in roles]


def constant(*_: float) -> float:
    return 1.0


EXPERT_FAULTS = [
    (Role.EXPERT_DOWN, "lr_adam", ADAMW, "mlp_ratio", "expert_down"),
    (Role.EXPERT_DOWN, "init_variance", ADAMW, "mlp_ratio", "branch"),
    (Role.EXPERT_DOWN, "lr_sgd", SGD, "mlp_ratio", "expert_down"),
    (Role.EXPERT_DOWN, "lr_sgd", SGD, "num_experts", "expert_down"),
    (Role.EXPERT_UP, "lr_sgd", SGD, "mlp_ratio", "expert_up"),
    (Role.EXPERT_UP, "lr_sgd", SGD, "num_experts", "expert_up"),
    (Role.ROUTER, "lr_sgd", SGD, "num_experts", "router"),
]
TABLE_FAULTS = [
    (Role.ROUTER, "lr_adam", ADAMW, "width", "router"),
    (Role.ROUTER, "lr_adam", ADAMW, "depth", "router"),
    (Role.ROUTER, "init_variance", ADAMW, "width", "router logits"),
    (Role.ROUTER, "lr_sgd", SGD, "width", "router"),
    (Role.EXPERT_UP, "lr_adam", ADAMW, "width", "expert_up"),
    (Role.EXPERT_UP, "init_variance", ADAMW, "width", "branch"),
    (Role.EXPERT_DOWN, "lr_adam", ADAMW, "depth", "expert_down"),
    (Role.EXPERT_DOWN, "init_variance", ADAMW, "width", "branch"),
]
Fault = tuple[Role, str, OptimizerConfig, Axis, str]


@pytest.mark.parametrize(
    ("table", "fault"),
    [("EXPERTS", fault) for fault in EXPERT_FAULTS] + [("TABLE", fault) for fault in TABLE_FAULTS],
    ids=lambda each: each if isinstance(each, str) else f"{each[0].value} {each[1]} {each[3]}",
)
def test_a_fault_in_a_rule_is_caught(table: str, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    role, column, optimizer, axis, quantity = fault
    rows = getattr(rules, table)
    monkeypatch.setitem(rows, role, replace(rows[role], **{column: constant}))
    # completep's rates do not depend on depth
    parameterization = ParameterizationConfig(name="depth_mup" if axis == "depth" else "completep", beta=0.5)
    assert f"{axis} {quantity}" in off(optimizer, (axis,), parameterization)


def gradients(config: MixtureVitConfig) -> dict[Role, float]:
    squares: dict[Role, list[float]] = {}
    for seed in range(4):
        scaled = build(config, COMPLETEP, seed)
        images, labels = draw_fixed_batch(config, Settings(), seed)
        logits = scaled.network(images)
        F.cross_entropy(logits - logits.detach(), labels).backward()
        for name, parameter in scaled.network.named_parameters():
            assert parameter.grad is not None
            squares.setdefault(scaled.rules[name].role, []).append(float(parameter.grad.square().mean()))
    return {role: math.sqrt(sum(each) / len(each)) for role, each in squares.items()}


@pytest.mark.parametrize("axis", ["width", "num_experts", "mlp_ratio"])
def test_eps_scales_as_the_gradients_do(axis: str) -> None:
    larger = replace(MOE, **{axis: 4 * getattr(MOE, axis)})
    table = ParameterizationConfig(name="completep", eps_scaling="table", beta=1 / 3)
    base, grown, scale = gradients(MOE), gradients(larger), build_meta(larger, table).scale
    for role in (Role.EXPERT_UP, Role.EXPERT_DOWN, Role.ROUTER):
        slope = math.log(grown[role] / base[role] / scale.factors(role, "adamw").eps, 4)
        noise = 0.5 if role is Role.ROUTER and axis != "num_experts" else 0.0  # incoherent at first, see SGD's targets
        assert -BAND - noise < slope < BAND, role


# ---------------------------------------------------------------- balance


def loads_after(rate: float, steps: int) -> dict[str, float]:
    """Of a mixture whose router has a taste of its own."""
    module = mixture(experts=8, active=2, rate=rate)
    for step in range(steps):
        module(1 + torch.randn(16, 16, 8, generator=torch.Generator().manual_seed(step)))
        counts = balance_experts({"mlp": module})
    return load_metrics({"mlp": module}, counts)


def test_biases_balance_the_load_and_the_gate_sees_where_they_do_not() -> None:
    assert describe_imbalance(loads_after(rate=0.02, steps=400)) is None
    assert describe_imbalance(loads_after(rate=0.0, steps=400)) is not None
    assert describe_imbalance(loads_after(rate=-0.02, steps=400)) is not None


def test_a_step_takes_the_rate_times_the_load_above_the_active_share_off_an_experts_balance() -> None:
    module = mixture(experts=4, active=2, rate=0.1)
    module.balance.copy_(torch.tensor([9.0, 8.0, 0.0, 0.0]))
    module(seeded(2, 5, 8))
    balance_experts({"mlp": module})
    torch.testing.assert_close(module.balance, torch.tensor([8.95, 7.95, 0.05, 0.05]))


def test_the_balance_does_not_depend_on_how_a_batch_is_shared() -> None:
    whole, parts, x = mixture(), mixture(), seeded(4, 5, 8)
    whole(x)
    for part in x.chunk(2):
        parts(part)
    counts = [balance_experts({"mlp": module}) for module in (whole, parts)]
    torch.testing.assert_close(*counts)
    torch.testing.assert_close(whole.balance, parts.balance)
    whole.eval()(x)
    assert not whole.load.any()
    ranks: Callable[[Tensor], Tensor] = lambda counted: 2 * counted  # noqa: E731  (two that saw the same)
    parts(x)
    torch.testing.assert_close(balance_experts({"mlp": parts}, ranks)[:, :-1].sum(), torch.tensor(2.0))


def test_a_router_that_says_nothing_has_the_largest_entropy() -> None:
    module = mixture()
    assert module.router is not None
    torch.nn.init.zeros_(module.router.weight)
    module(seeded(4, 5, 8))
    assert balance_experts({"mlp": module})[0, -1] == pytest.approx(1)


MODEL = {"family": "moe_vit", "width": 16, "depth": 2, "base_width": 16, "base_depth": 2, "head_dim": 8}
MODEL |= {"num_experts": 4, "base_num_experts": 4, "active_share": 0.5, "mlp_ratio": 2, "base_mlp_ratio": 2}
MODEL |= {"patch_size": 2, "class_token": False, "global_pool": "avg"}


def test_a_run_trains_and_tells_of_its_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_load, "MEAN_DEVIATION", 0.0)  # so that the gate has something to say
    overrides = ("optimizer.name=adamw", "optimizer.lr=0.01", "train.samples=1920", "train.log_every=10")
    config = run_config(pack_digits(tmp_path / "digits"), *overrides, model=MODEL)
    run(config, tmp_path / "run")
    trained = losses(tmp_path / "run")
    assert trained[-1] < 0.95 * trained[0]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert sum(line[f"expert_load/blocks.1.mlp.{number}"] for number in range(4)) == pytest.approx(2)
    assert 0 < line["router_entropy/blocks.0.mlp"] <= 1
    done = json.loads((tmp_path / "run" / "done.json").read_text())
    assert done["unbalanced"].startswith("the experts of blocks.0.mlp are not balanced: mean deviation of load")


def test_runs_that_route_are_trained_one_by_one() -> None:
    config = run_config(Path("nowhere"), model=MODEL)
    assert list_obstacles(config, config) == ["model.num_experts"]


def test_a_dense_proxys_optimum_may_be_carried_to_experts() -> None:
    experts = {"num_experts": 1, "active_share": 1.0, "mlp_ratio": 4, "base_num_experts": 1, "base_mlp_ratio": 4}
    dense = run_config(Path("nowhere"), model=MODEL | experts)
    target = run_config(Path("nowhere"), model=MODEL | experts | {"num_experts": 8, "active_share": 0.25, "width": 32})
    assert describe_differences(list_task_values(dense), list_task_values(target)) == ""
    other = run_config(
        Path("nowhere"), model=MODEL | experts | {"num_experts": 8, "active_share": 0.25, "balance_rate": 0.5}
    )
    assert "balance_rate" in describe_differences(list_task_values(dense), list_task_values(other))


def test_exported_weights_give_the_plain_network_the_same_outputs() -> None:
    larger = replace(MOE, width=64, depth=6, num_experts=8)
    scaled = build(larger, COMPLETEP, seed=0)
    name, arguments = find_timm_call(larger)
    plain = timm.create_model(name, **arguments)
    plain.load_state_dict(folded_state(scaled))
    images = seeded(2, 1, 8, 8)
    torch.testing.assert_close(plain.eval()(images), scaled.network.eval()(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active_share": 0.3}, r"active_share 0.3 of num_experts 4 is no whole number of experts: use 0.25"),
        ({"mlp_ratio": 0.03}, "width 32 times mlp_ratio 0.03 is no whole width"),
        ({"active_share": 1.5}, "active_share"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        replace(MOE, **changes)
