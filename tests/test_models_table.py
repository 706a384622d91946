"""Every cell of the rule table as a literal number, worked out by hand from the papers' tables, not from our formulas.

One network has one parameter of each role. It is four times as wide and nine times as deep as its base; learning rate,
eps and weight decay are 1, so that what the optimizer holds are the factors themselves.
"""

from functools import partial
from typing import Any

import pytest
from torch import nn

from depthmup import models
from depthmup.models import Init, OptimizerConfig, ParameterizationConfig, ParameterRule, Role, Roles, Size, Slot
from depthmup.models.parameterization import EXPERTS

BASE, SIZE = Size(width=16, depth=1, head_dim=4), Size(width=64, depth=9, head_dim=16)
HELD = tuple(role for role in Role if role not in EXPERTS)  # those of experts: tests/test_models_moe.py
MATRICES = (Role.INPUT, Role.BRANCH_HIDDEN, Role.HIDDEN, Role.READOUT, Role.GATE)
DECAYING = {role.value for role in MATRICES}
ROLES = Roles(
    parameters=tuple(ParameterRule(rf"{role.value}\..*", role, Init("normal", 1.0)) for role in HELD),
    branches=(Slot("branch_hidden", "branch_hidden"),),
    readout="readout",
    queries=(Slot("hidden", "hidden"),),
)


class OneOfEachRole(nn.Module):
    """A matrix or a vector per role, called as its role is; never run forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for role in HELD:
            one = nn.Linear(width, width, bias=False) if role in MATRICES else nn.RMSNorm(64 * width)
            self.add_module(role.value, one)


def scaled_at(size: Size = SIZE, **parameterization: Any) -> models.ScaledModel:
    return models.apply(
        ParameterizationConfig(**parameterization), OneOfEachRole(size.width), size=size, base=BASE, roles=ROLES, seed=0
    )


def held_by_the_optimizer(scaled: models.ScaledModel, config: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """Role -> the settings of the one group of the torch optimizer that holds its weight."""
    groups = models.parameter_groups(scaled.network, scaled.rules, scaled.scale, config)
    names = {id(parameter): name for name, parameter in scaled.network.named_parameters()}
    return {
        names[id(parameter)].removesuffix(".weight"): group
        for group in models.build_optimizer(groups, config).param_groups
        for parameter in group["params"]
    }


def adamw(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 1.0, "eps": 1.0, "weight_decay": 1.0, "weight_decay_mode": "coupled"} | settings)


def sgd(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"name": "sgd", "lr": 1.0, "weight_decay": 1.0, "weight_decay_mode": "coupled"} | settings)


# fmt: off
LITERAL = {
    # role:            init std, lr of SGD, lr of AdamW, eps of AdamW, decay of AdamW
    "sp": {
        "input":         (1,     1,         1,           1,            1),
        "branch_hidden": (1 / 2, 1,         1,           1,            1),
        "hidden":        (1 / 2, 1,         1,           1,            1),
        "branch_vector": (1,     1,         1,           1,            0),
        "vector":        (1,     1,         1,           1,            0),
        "stream_vector": (1,     1,         1,           1,            0),
        "branch_scalar": (1,     1,         1,           1,            0),
        "scalar":        (1,     1,         1,           1,            0),
        "readout":       (1 / 2, 1,         1,           1,            1),
        "gate":          (1 / 2, 1,         1,           1,            1),
    },
    "mup": {
        "input":         (1,     4,         1,           1,            1),
        "branch_hidden": (1 / 2, 1,         1 / 4,       1,            4),
        "hidden":        (1 / 2, 1,         1 / 4,       1,            4),
        "branch_vector": (1,     4,         1,           1,            0),
        "vector":        (1,     4,         1,           1,            0),
        "stream_vector": (1,     4,         1,           1,            0),
        "branch_scalar": (1,     1,         1,           1,            0),
        "scalar":        (1,     1,         1,           1,            0),
        "readout":       (1,     4,         1,           1,            1),
        "gate":          (1 / 4, 1 / 4,     1 / 4,       1,            4),
    },
    "depth_mup": {
        "input":         (1,     4,         1,           1 / 4,        1),
        "branch_hidden": (1 / 2, 1,         1 / 12,      1 / 12,       4),
        "hidden":        (1 / 2, 1,         1 / 4,       1 / 4,        4),
        "branch_vector": (1,     4,         1 / 3,       1 / 12,       0),
        "vector":        (1,     4,         1,           1 / 4,        0),
        "stream_vector": (1,     4 / 9,     1 / 9,       1 / 4,        0),
        "branch_scalar": (1,     1,         1 / 3,       1 / 3,        0),
        "scalar":        (1,     1,         1,           1,            0),
        "readout":       (1,     4,         1,           1 / 4,        1),
        "gate":          (1 / 4, 1 / 4,     1 / 4,       1,            4),
    },
    "completep": {
        "input":         (1,     4,         1,           1,            1),
        "branch_hidden": (1 / 2, 9,         1 / 4,       1 / 36,       4),
        "hidden":        (1 / 2, 1,         1 / 4,       1,            4),
        "branch_vector": (1,     36,        1,           1 / 36,       0),
        "vector":        (1,     4,         1,           1,            0),
        "stream_vector": (1,     4 / 9,     1 / 9,       1,            0),
        "branch_scalar": (1,     9,         1,           1 / 9,        0),
        "scalar":        (1,     1,         1,           1,            0),
        "readout":       (1,     4,         1,           1,            1),
        "gate":          (1 / 4, 1 / 4,     1 / 4,       1,            4),
    },
}
# preset:               branch, readout, attention (where the head dim grows with width)
LITERAL_MULTIPLIERS = {
    "sp":               (1,     1,       1),
    "mup":              (1,     1 / 4,   1 / 2),
    "depth_mup":        (1 / 3, 1 / 4,   1 / 2),
    "completep":        (1 / 9, 1 / 4,   1 / 2),
}
# of Muon's two roles: lr in branches and outside, with torch's match_rms_adamw, which itself carries sqrt(width)
LITERAL_MUON = {"sp": (1, 1), "mup": (1 / 2, 1 / 2), "depth_mup": (1 / 6, 1 / 2), "completep": (1 / 2, 1 / 2)}
# fmt: on


@pytest.mark.parametrize("name", LITERAL)
def test_every_cell_of_the_table_is_the_papers_number(name: str) -> None:
    scaled = scaled_at(name=name)
    with_sgd = held_by_the_optimizer(scaled, sgd())
    adam = held_by_the_optimizer(scaled, adamw())
    independent = held_by_the_optimizer(scaled, adamw(lr=0.1, weight_decay_mode="independent"))
    assert set(adam) == set(LITERAL[name])
    for role, (init_std, lr_sgd, lr_adam, eps, decay) in LITERAL[name].items():
        weight = scaled.network.get_submodule(role).weight
        assert weight.std().item() == pytest.approx(init_std, rel=0.05), role  # 4096 draws
        assert with_sgd[role]["lr"] == pytest.approx(lr_sgd), role
        assert with_sgd[role]["weight_decay"] == pytest.approx(1 / lr_sgd if role in DECAYING else 0), role
        held = adam[role]
        assert (held["lr"], held["eps"], held["weight_decay"]) == pytest.approx((lr_adam, eps, decay)), role
        per_step = independent[role]["lr"] * independent[role]["weight_decay"]
        assert per_step == pytest.approx(1 if role in DECAYING else 0), role


@pytest.mark.parametrize("name", LITERAL_MULTIPLIERS)
def test_every_multiplier_is_the_papers_number(name: str) -> None:
    installed = scaled_at(name=name).multipliers
    modules = ("branch_hidden", "readout", "hidden")  # where ROLES puts branch, readout and queries
    values = tuple(installed[module].value if module in installed else 1 for module in modules)
    assert values == pytest.approx(LITERAL_MULTIPLIERS[name])


@pytest.mark.parametrize("name", LITERAL_MULTIPLIERS)
def test_beta_multiplies_branches_and_gamma0_divides_the_readout_and_neither_moves_another(name: str) -> None:
    installed = scaled_at(name=name, beta=0.5, gamma0=4.0).multipliers
    branch, readout, attention = LITERAL_MULTIPLIERS[name]
    assert installed["branch_hidden"].value == pytest.approx(branch / 2)
    assert installed["readout"].value == pytest.approx(readout / 4)
    assert (installed["hidden"].value if "hidden" in installed else 1) == pytest.approx(attention)


@pytest.mark.parametrize("name", LITERAL_MUON)
def test_muon_trains_hidden_matrices_at_its_own_rate_and_adamw_the_rest_at_its(name: str) -> None:
    held = held_by_the_optimizer(scaled_at(name=name), adamw(name="muon"))
    in_branch, outside = LITERAL_MUON[name]
    assert held["branch_hidden"]["lr"] == pytest.approx(in_branch)
    assert held["hidden"]["lr"] == pytest.approx(outside)
    for role in ("branch_hidden", "hidden"):  # lr * decay does not depend on width
        assert held[role]["weight_decay"] == pytest.approx(1 if name == "sp" else 2)
    for role in set(held) - {"branch_hidden", "hidden"}:
        assert held[role]["algorithm"] == "adamw"
        assert held[role]["lr"] == pytest.approx(LITERAL[name][role][2]), role


def test_alpha_overrides_the_presets_exponent_in_every_formula_that_has_it() -> None:
    deep = Size(width=16, depth=16, head_dim=4)
    scaled = scaled_at(deep, name="depth_mup", alpha=0.75)
    assert scaled.multipliers["branch_hidden"].value == pytest.approx(1 / 8)
    with_sgd, adam = (held_by_the_optimizer(scaled, config) for config in (sgd(), adamw()))
    for role in ("branch_hidden", "branch_vector", "branch_scalar"):
        assert (with_sgd[role]["lr"], adam[role]["lr"], adam[role]["eps"]) == pytest.approx((4, 1 / 2, 1 / 8)), role
    for role in ("input", "hidden", "vector", "scalar", "readout"):
        assert (with_sgd[role]["lr"], adam[role]["lr"], adam[role]["eps"]) == (1, 1, 1), role


def test_adam_depth_lr_is_the_exponent_of_depth_in_adamws_rate_inside_branches_only() -> None:
    for exponent, in_branch in ((0.0, 1), (-1.0, 1 / 9)):  # the default at alpha = 1/2 is -1/2
        scaled = scaled_at(name="depth_mup", adam_depth_lr=exponent)
        adam = held_by_the_optimizer(scaled, adamw())
        assert adam["branch_hidden"]["lr"] == pytest.approx(in_branch / 4)
        assert adam["branch_vector"]["lr"] == pytest.approx(in_branch)
        assert adam["branch_scalar"]["lr"] == pytest.approx(in_branch)
        assert (adam["hidden"]["lr"], adam["input"]["lr"], adam["vector"]["lr"]) == (1 / 4, 1, 1)
        assert adam["branch_hidden"]["eps"] == pytest.approx(1 / 12)  # untouched


def test_eps_scaling_is_the_tables_or_in_branches_only_or_none() -> None:
    def eps(scaling: str) -> dict[str, float]:
        held = held_by_the_optimizer(scaled_at(name="depth_mup", eps_scaling=scaling), adamw())
        return {role: group["eps"] for role, group in held.items()}

    everywhere = {role: row[3] for role, row in LITERAL["depth_mup"].items()}
    in_branches = {"branch_hidden": 1 / 12, "branch_vector": 1 / 12, "branch_scalar": 1 / 3}
    assert eps("table") == pytest.approx(everywhere)
    assert eps("branch") == pytest.approx(dict.fromkeys(everywhere, 1) | in_branches)
    assert eps("none") == dict.fromkeys(everywhere, 1)
    # gamma0 divides every gradient but that of the readout's bias, and so eps, whatever else scales it
    held = held_by_the_optimizer(scaled_at(name="depth_mup", eps_scaling="none", gamma0=4.0), adamw())
    assert {role: group["eps"] for role, group in held.items()} == dict.fromkeys(everywhere, 1 / 4) | {"scalar": 1}


def test_weight_decay_scaling_is_the_exponent_of_width_in_a_hidden_matrixs_coupled_decay() -> None:
    for exponent, adam_decay, muon_decay in ((0.5, 2, 2**0.5), (0.0, 1, 1)):
        scaled = scaled_at(name="depth_mup", weight_decay_scaling=exponent)
        adam, muon = (held_by_the_optimizer(scaled, adamw(name=name)) for name in ("adamw", "muon"))
        for role in ("branch_hidden", "hidden"):
            assert adam[role]["weight_decay"] == pytest.approx(adam_decay)
            assert muon[role]["weight_decay"] == pytest.approx(muon_decay)
        for role in ("input", "readout"):
            assert adam[role]["weight_decay"] == muon[role]["weight_decay"] == 1


def test_batch_and_duration_move_adamws_settings_by_roots_of_their_ratio() -> None:
    """Complete(d)P: lr and decay times sqrt(m_B / m_D), eps over it, 1 - beta times m_B / m_D."""
    scaled = scaled_at(BASE)
    larger = {"batch_ratio": 8.0, "samples_ratio": 2.0, "betas": (0.9, 0.99)}  # m_B / m_D = 4
    held = held_by_the_optimizer(scaled, adamw(**larger))["hidden"]
    assert (held["lr"], held["eps"], held["weight_decay"]) == pytest.approx((2, 1 / 2, 2))
    assert held["betas"] == pytest.approx((0.6, 0.96))
    independent = held_by_the_optimizer(scaled, adamw(**larger, weight_decay_mode="independent"))["hidden"]
    assert independent["lr"] * independent["weight_decay"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("name", "lr", "one_minus_beta"), [("sgd", 8, None), ("adamw", 8**0.5 * 2**-0.5, 4), ("muon", 8**0.5, 8)]
)
def test_every_optimizer_has_a_row_for_batch_and_samples(name: str, lr: float, one_minus_beta: float | None) -> None:
    """Eight times the batch and twice the samples, by hand. What a step takes off grows with m_B / m_D."""
    scaled, ratios = scaled_at(BASE), {"batch_ratio": 8.0, "samples_ratio": 2.0}
    config = sgd if name == "sgd" else partial(adamw, name=name, betas=(0.99, 0.999))
    for mode in ("coupled", "independent"):
        held = held_by_the_optimizer(scaled, config(**ratios, weight_decay_mode=mode))
        assert all(group["lr"] == pytest.approx(lr) for group in held.values())
        assert held["hidden"]["lr"] * held["hidden"]["weight_decay"] == pytest.approx(8 / 2)
    if one_minus_beta:
        assert held["input"]["betas"] == pytest.approx((1 - 0.01 * one_minus_beta, 1 - 0.001 * one_minus_beta))
        assert held["input"]["eps"] == pytest.approx(one_minus_beta**-0.5)


def test_a_parameterization_states_other_exponents_of_the_rate_and_decay_keeps_its_share() -> None:
    scaled = scaled_at(BASE, batch_lr=1 / 3, samples_lr=-0.3)
    ratios = {"batch_ratio": 8.0, "samples_ratio": 2.0}
    for config in (sgd(**ratios), adamw(**ratios), adamw(name="muon", **ratios)):
        held = held_by_the_optimizer(scaled, config)["hidden"]
        assert held["lr"] == pytest.approx(2 * 2**-0.3)
        assert held["lr"] * held["weight_decay"] == pytest.approx(4)


def test_gamma0_moves_rates_but_no_decay_a_step_and_not_the_readouts_bias() -> None:
    def held(gamma0: float, name: str, **settings: Any) -> dict[str, dict[str, Any]]:
        config = sgd(**settings) if name == "sgd" else adamw(name=name, **settings)
        return held_by_the_optimizer(scaled_at(BASE, gamma0=gamma0), config)

    for name, factor, eps in (("sgd", 16, None), ("adamw", 4, 1 / 4), ("muon", 4, 1 / 4)):
        for role, group in held(4.0, name).items():
            assert group["lr"] == (1 if role == "scalar" else factor), (name, role)
            if group.get("algorithm") == "adamw":
                assert group["eps"] == (1 if role == "scalar" else eps), (name, role)
            assert group["lr"] * group["weight_decay"] == (1 if role in DECAYING else 0), (name, role)
        for group in held(4.0, name, weight_decay_mode="independent").values():
            assert group["lr"] * group["weight_decay"] in (0, 1)
    assert scaled_at(BASE, gamma0=4.0).multipliers["readout"].value == 1 / 4


def test_the_optimizers_own_settings_reach_it() -> None:
    scaled = scaled_at(BASE)
    with_sgd = held_by_the_optimizer(scaled, sgd(momentum=0.8, nesterov=True))["hidden"]
    assert (with_sgd["momentum"], with_sgd["nesterov"]) == (0.8, True)
    assert held_by_the_optimizer(scaled, adamw(betas=(0.8, 0.95)))["hidden"]["betas"] == (0.8, 0.95)
    muon = held_by_the_optimizer(scaled, adamw(name="muon", momentum=0.9, betas=(0.8, 0.95)))
    assert (muon["hidden"]["momentum"], muon["input"]["betas"]) == (0.9, (0.8, 0.95))
