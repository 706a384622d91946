"""The Probabilistic Transformer computes mean-field inference, and its rules of width hold, each one of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from depthmup.models import ParameterizationConfig
from depthmup.models import parameterization as rules
from depthmup.models.build import ScaledModel, build, build_meta
from depthmup.models.config import ProbabilisticConfig
from depthmup.models.coordinate_check import AXES, Axis, Settings, check
from depthmup.models.errors import ModelError
from depthmup.models.optimizer import parameter_groups
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization import Role, Scale
from depthmup.models.probabilistic import ProbabilisticTransformer
from depthmup.models.timm_registry import find_timm_call
from depthmup.train.loop import run
from train_configs import losses, pack_digits, run_config

BASE = ProbabilisticConfig(
    **{"width": 32, "depth": 3, "base_width": 32, "base_depth": 3, "channels": 8, "patch_size": 2},
    **{"num_classes": 10, "image_size": 8, "in_channels": 1},
)
MUP, SP = ParameterizationConfig(name="mup", eps_scaling="table"), ParameterizationConfig(name="sp")
ADAMW, SGD = OptimizerConfig(name="adamw", lr=2**-9), OptimizerConfig(name="sgd", lr=0.03)


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def written_out(network: ProbabilisticTransformer, images: Tensor, tau: float, N: int, r: int) -> Tensor:
    """The messages of 2604.25409's potentials tau S, tau N U'V and tau M B with M = N, variable by variable; the scores
    of a channel at temperature N / r, which makes sqrt(r) of the base a constant."""
    unary = (network.unary(images).flatten(2).transpose(1, 2) + network.position)[0]
    ternary = [
        N * u.T @ v
        for u, v in zip(
            network.factors.ternary_u.weight.split(r), network.factors.ternary_v.weight.split(r), strict=True
        )
    ]
    binary, patches, scores = N * network.factors.binary.weight, len(unary), tau * unary
    itself, temperature = torch.eye(patches).bool(), N / r**0.5
    for _ in network.iterations:
        q, messages = scores.softmax(-1), unary.clone()
        for potential in ternary:
            heads = (tau * temperature * q @ potential @ q.T).masked_fill(itself, -torch.inf).softmax(-1)
            for i in range(patches):
                for j in range(patches):
                    messages[i] += heads[i, j] * potential @ q[j] + heads[j, i] * potential.T @ q[j]
        for i in range(patches):
            messages[i] += (tau * binary @ q[i]).softmax(-1) @ binary
        scores = tau * messages
    return network.head(network.norm(scores).mean(0))


def test_at_the_base_it_is_mean_field_inference_with_the_papers_potentials() -> None:
    config = replace(BASE, width=8, base_width=8, depth=2, channels=2)
    network = build(config, MUP, seed=0).network
    assert isinstance(network, ProbabilisticTransformer)
    images = seeded(1, 1, 8, 8)
    torch.testing.assert_close(network(images)[0], written_out(network, images, config.tau, N=8, r=4))


def test_wider_networks_have_the_papers_factors_and_groups() -> None:
    wide = replace(BASE, width=128)
    scaled = build_meta(wide, MUP)
    values = {name.rpartition(".")[2]: each.value for name, each in scaled.multipliers.items()}
    assert values == {"labels": 4, "topics": 4, "queries": 0.5, "head": 0.25}
    rates = {
        name: group["lr"] / ADAMW.lr
        for group in parameter_groups(scaled.network, scaled.rules, scaled.scale, ADAMW)
        for name, parameter in scaled.network.named_parameters()
        if any(parameter is each for each in group["params"])
    }
    hidden = {"factors.ternary_u.weight", "factors.ternary_v.weight", "factors.binary.weight"}
    assert {name for name, rate in rates.items() if rate == 0.25} == hidden
    assert {rate for name, rate in rates.items() if name not in hidden} == {1.0}
    assert build_meta(wide, SP).multipliers == {}


def test_matrices_are_decayed_and_neither_places_nor_vectors() -> None:
    scaled, config = build_meta(BASE, MUP), replace(ADAMW, weight_decay=0.1)
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, config)
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in scaled.network.named_parameters() if id(parameter) in decayed}
    factors = {f"factors.{name}.weight" for name in ("ternary_u", "ternary_v", "binary")}
    assert names == {"unary.weight", "head.weight", *factors}


def test_iterations_share_their_weights() -> None:
    sizes = [
        sum(parameter.numel() for parameter in build_meta(replace(BASE, depth=depth), MUP).network.parameters())
        for depth in (1, 6)
    ]
    assert sizes[0] == sizes[1]


def verdicts(
    optimizer: OptimizerConfig = ADAMW, axes: tuple[Axis, ...] = ("width",), chosen: ParameterizationConfig = MUP
) -> dict[str, str]:
    if optimizer is SGD:
        chosen = replace(chosen, eps_scaling=None)  # it has none
    lines = check(BASE, chosen, optimizer, Settings(factors=(1, 4), steps=2, num_seeds=8), axes)
    return {f"{line.axis} {line.quantity} {line.step}": line.verdict for line in lines}


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=lambda each: each.name)
def test_the_check_passes_over_width_and_over_the_number_of_iterations(optimizer: OptimizerConfig) -> None:
    assert {place: found for place, found in verdicts(optimizer, AXES).items() if found != "ok"} == {}


def off(optimizer: OptimizerConfig = ADAMW) -> set[str]:
    return {place.split(" ", 1)[1].rpartition(" ")[0] for place, found in verdicts(optimizer).items() if found == "off"}


def test_without_rules_the_check_fails() -> None:
    found = {place for place, verdict in verdicts(chosen=SP).items() if verdict == "off"}
    assert {"width hidden 1", "width logits 1", "width attention logits 0"} <= found


def unscaled(self: Scale) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("multiplier", "caught"),
    [
        ("distribution_multiplier", "attention logits"),
        ("attention_multiplier", "attention logits"),
        ("readout_multiplier", "logits"),
    ],
)
def test_a_multiplier_that_is_left_out_is_caught(multiplier: str, caught: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scale, multiplier, unscaled)
    assert caught in off()


def constant(N: float, L: float, a: float) -> float:
    return 1.0


def grows(N: float, L: float, a: float) -> float:
    return N


FAULTS: list[tuple[Role, str, Callable[[float, float, float], float], OptimizerConfig, str]] = [
    (Role.INPUT, "lr_adam", grows, ADAMW, "input"),
    (Role.INPUT, "lr_sgd", constant, SGD, "input"),
    (Role.INPUT, "init_variance", grows, ADAMW, "stream input"),
    (Role.VECTOR, "lr_adam", grows, ADAMW, "vector"),
    (Role.VECTOR, "lr_sgd", constant, SGD, "vector"),
    (Role.HIDDEN, "lr_adam", constant, ADAMW, "hidden"),
    (Role.HIDDEN, "lr_sgd", grows, SGD, "hidden"),
    (Role.HIDDEN, "init_variance", constant, ADAMW, "stream"),
    (Role.READOUT, "lr_adam", grows, ADAMW, "readout"),
    (Role.READOUT, "lr_sgd", constant, SGD, "readout"),
    (Role.READOUT, "init_variance", grows, ADAMW, "logits"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda each: f"{each[0].value} {each[1]}")
def test_a_fault_in_a_rule_of_a_group_is_caught(fault: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    role, column, formula, optimizer, caught = fault
    monkeypatch.setitem(rules.TABLE, role, replace(rules.TABLE[role], **{column: formula}))
    assert caught in off(optimizer)


def gradient_sizes(scaled: ScaledModel) -> dict[Role, float]:
    labels = torch.arange(16) % 10
    torch.nn.functional.cross_entropy(scaled.network(seeded(16, 1, 8, 8)), labels).backward()
    squares: dict[Role, list[float]] = {}
    for name, parameter in scaled.network.named_parameters():
        assert parameter.grad is not None
        squares.setdefault(scaled.rules[name].role, []).append(float(parameter.grad.square().mean()))
    return {role: (sum(each) / len(each)) ** 0.5 for role, each in squares.items()}


def test_eps_scales_as_the_gradients_do() -> None:
    wide = build(replace(BASE, width=256), MUP, seed=0)
    base, grown = gradient_sizes(build(BASE, MUP, seed=0)), gradient_sizes(wide)
    for role in base:
        assert 0.6 < grown[role] / base[role] / wide.scale.factors(role, "adamw").eps < 1.6, role


MODEL = {"family": "probabilistic", "width": 16, "depth": 2, "base_width": 16, "base_depth": 2, "patch_size": 2}


def test_a_run_by_configuration_trains(tmp_path: Path) -> None:
    overrides = ("optimizer.name=adamw", "optimizer.lr=0.01", "parameterization.name=mup", "train.samples=9600")
    run(run_config(pack_digits(tmp_path / "digits"), *overrides, model=MODEL), tmp_path / "run")
    trained = losses(tmp_path / "run")
    assert sum(trained[-5:]) < 0.95 * sum(trained[:5])


@pytest.mark.parametrize(
    ("changes", "parameterization", "message"),
    [
        ({"width": 36}, MUP, "width 36 must be a multiple of channels 8: use 32 or 40"),
        ({"patch_size": 3}, MUP, "image_size 8 must be a multiple of patch_size 3"),
        ({"patch_size": 8}, MUP, "one patch has no other to depend on"),
        (
            {},
            ParameterizationConfig(name="depth_mup"),
            "no residual branches, so that rules of depth and beta would do",
        ),
        ({}, ParameterizationConfig(name="mup", beta=0.5), "use parameterization.name mup, or sp, and leave beta out"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], parameterization: ParameterizationConfig, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build_meta(replace(BASE, **changes), parameterization)


def test_an_export_is_refused_by_reason() -> None:
    with pytest.raises(ModelError, match="factor N on probabilities has no weight to go into"):
        find_timm_call(BASE)
