"""A setting either changes what is trained, or is refused: every field of five sections, in every kind of run."""

from dataclasses import fields
from functools import cache
from itertools import count, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

from depthmup.data.errors import UserError
from depthmup.launch.config import StudyFile
from depthmup.models.build import ScaledModel, build
from depthmup.models.config import (
    ConvResNetConfig,
    MixtureVitConfig,
    OwnConfig,
    ProbabilisticConfig,
    ResNetConfig,
    TimmConfig,
    VisionTransformerConfig,
)
from depthmup.models.errors import ModelError
from depthmup.models.moe_vit import find_mixtures
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.models.optimizer_config import OptimizerConfig, RoleRates
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.train.config import RunConfig, ScheduleConfig, TrainConfig
from depthmup.train.expert_load import balance_experts
from depthmup.train.loop import run as train
from depthmup.train.reading import from_plain
from depthmup.train.schedule import schedule, set_learning_rate
from train_configs import timeless_metrics

MODEL = {
    **{"family": "vit", "width": 16, "depth": 4, "base_width": 8, "base_depth": 2, "num_heads": 2, "patch_size": 4},
    **{"num_classes": 10, "image_size": 8, "in_channels": 1},
}
PRESETS = ("sp", "mup", "depth_mup", "completep")
DECAY = {"lr": 0.01, "weight_decay": 0.01, "batch_ratio": 2.0, "samples_ratio": 3.0}
OPTIMIZERS: tuple[dict[str, Any], ...] = tuple(
    {"name": name, "weight_decay_mode": mode, **DECAY}
    for name, mode in product(("sgd", "adamw", "muon"), ("independent", "coupled"))
)
DATA = {"name": "x", "root": "x", "num_streams": 4}
SCHEDULES = ("cosine", "constant", "wsd")
OTHER: dict[Any, dict[str, tuple[Any, ...]]] = {  # than the default, or than what is stated above
    OptimizerConfig: {
        **{"name": ("sgd", "adamw", "muon"), "lr": (0.02,), "momentum": (0.5,), "nesterov": (True,)},
        **{"betas": ([0.8, 0.999], [0.9, 0.99]), "eps": (1e-3,), "weight_decay": (0.02,)},
        **{"weight_decay_mode": ("independent", "coupled"), "batch_ratio": (4.0,), "samples_ratio": (4.0,)},
        **{"role_lr": ({"input": 2.0},), "beta_scaling": ("second", "none"), "tau_ema": (0.5,)},
    },
    ParameterizationConfig: {
        **{"name": PRESETS, "alpha": (0.75,), "adam_depth_lr": (0.25,), "eps_scaling": ("table", "branch", "none")},
        **{"weight_decay_scaling": (0.5,), "beta": (0.5,), "gamma0": (2.0,)},
        **{"batch_lr": (0.3,), "samples_lr": (-0.3,)},
    },
    ScheduleConfig: {"name": SCHEDULES, "warmup": (0.3,), "decay": (0.4,)},
    TrainConfig: {
        **{"samples": (96,), "global_batch_size": (64,), "label_smoothing": (0.1,), "clip_norm": (0.01,)},
        **{"drop_path": (0.5,), "ema": (0.5,), "precision": ("bf16",), "bf16_residual": (True,)},
        **{"batch_norm_images": (8,), "evaluate": ([],)},
    },
}
SHAPE = {"width": 32, "depth": 8, "base_width": 32, "base_depth": 4, "num_classes": 10, "image_size": 8}
OF_ANY_MODEL: dict[str, tuple[Any, ...]] = {
    **{"width": (64,), "depth": (4,), "base_width": (64,), "base_depth": (8,), "num_classes": (5,)},
    **{"image_size": (16,), "in_channels": (1,)},
}
OF_VIT: dict[str, tuple[Any, ...]] = {
    **{"timm_name": ("vit_base_patch16_clip_224",), "head_dim": (4,), "num_heads": (4,), "patch_size": (2,)},
    **{"mlp_ratio": (2.0,), "qk_norm": (True,), "class_token": (False,), "global_pool": ("avg",)},
    **{"layer_scale": (0.1,)},
}
PLAIN = Path(__file__).with_name("plain_network.py").read_text()
SMALL = {"family": "timm", "width": 16, "depth": 2, "base_width": 16, "base_depth": 1}  # roles are found by looking
OF_MODEL: dict[Any, tuple[list[dict[str, Any]], dict[str, tuple[Any, ...]]]] = {  # contexts, and other values
    VisionTransformerConfig: (
        [{"family": "vit", "num_heads": 2, "patch_size": 4}],
        OF_VIT,
    ),
    MixtureVitConfig: (
        [
            {"family": "moe_vit", "num_heads": 2, "patch_size": 4, "num_experts": 4, "active_share": 0.5},
            {"family": "moe_vit", "num_heads": 2, "patch_size": 4},
        ],
        {
            **{**OF_VIT, "num_experts": (8,), "base_num_experts": (2,), "active_share": (0.25,)},
            **{"base_mlp_ratio": (2.0,), "balance_rate": (0.1,)},
        },
    ),
    ResNetConfig: (
        [{"family": "resnet", "norm": norm} for norm in ("batch", "group", "none")],
        {
            **{"block": ("bottleneck",), "blocks": ([3, 1, 2, 2],), "preactivation": (True,)},
            **{"norm": ("batch", "group", "none"), "num_groups": (8,)},
        },
    ),
    ProbabilisticConfig: (
        [{"family": "probabilistic"}],
        {"channels": (2,), "patch_size": (2,), "tau": (1.0,)},
    ),
    ConvResNetConfig: (
        [{"family": "conv_resnet", "num_stages": 2}],
        {"num_stages": (4,), "convs_per_branch": (2,), "norm": ("batch", "layer"), "activation": ("tanh",)},
    ),
    TimmConfig: (
        [
            {"timm_name": "vit_tiny_patch16_224", "head_dim": 8, "arguments": {"patch_size": 4}, **SMALL},
            {"timm_name": "resnet26", **SMALL, "width": 32, "base_width": 32},
        ],
        {
            **{"timm_name": ("resnet26d", "vit_base_patch16_clip_224"), "head_dim": (None, 4)},
            "arguments": ({"patch_size": 2}, {"avg_down": True}),
        },
    ),
    OwnConfig: (
        [{**SMALL, "family": "own", "builder": "Net", "code": PLAIN}],
        {"builder": ("make_wider",), "code": (PLAIN.replace("relu", "tanh"),)},
    ),
}
# of timm's network: heads without a head_dim, which another network has, and arguments that are another network's
OF_OTHER_NETWORKS = ("state head_dim", "timm cannot build")
OF_FAMILY = {"probabilistic": {"name": "mup"}}  # it has no branches, for which the others have rules
IDLE = {ProbabilisticConfig: ["base_depth: 8"]}  # as under mup for every family: the number of iterations has no factor
BESIDE: dict[str, dict[str, Any]] = {
    "tau_ema": {"weight_decay": 0.0},
    "head_dim": {"num_heads": None},
    "class_token": {"global_pool": "avg"},
}


REFUSED = {
    "sgd": {"betas", "eps", "beta_scaling"},
    "adamw": {"momentum", "nesterov"},
    "muon": {"nesterov"},
}


def run_of(
    optimizer: dict[str, Any], parameterization: dict[str, Any], shape: dict[str, Any], steps: int = 20
) -> RunConfig:
    raw = {
        **{"model": MODEL, "optimizer": optimizer, "parameterization": parameterization, "schedule": shape},
        **{
            "data": {"name": "x", "root": "x", "num_streams": 4},
            "train": {"samples": 4 * steps, "global_batch_size": 4},
        },
    }
    return from_plain(RunConfig, raw, "test")


@cache
def network_of(parameterization: ParameterizationConfig) -> tuple[ScaledModel, dict[str, torch.Tensor]]:
    """The network, and a copy of its initial weights."""
    scaled = build(run_of({"lr": 0.01}, {}, {}).model, parameterization, seed=0)
    return scaled, {name: tensor.clone() for name, tensor in scaled.network.state_dict().items()}


def learned(run: RunConfig) -> tuple[Any, ...]:
    """All that the three sections can change: multipliers, and the weights at first and after three steps."""
    scaled, initial = network_of(run.parameterization)
    scaled.network.load_state_dict(initial)
    multipliers = {name: multiplier.value for name, multiplier in scaled.multipliers.items()}
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, run.resolved_optimizer)
    optimizer = build_optimizer(groups, run.optimizer)
    weights = [torch.cat([p.detach().flatten() for p in scaled.network.parameters()])]
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        set_learning_rate(optimizer, run.optimizer.lr, schedule(run.schedule, step, run.train.num_steps))
        for parameter in scaled.network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in scaled.network.parameters()]))
    return multipliers, torch.stack(weights).double().numpy().tobytes()


def tried(
    others: dict[str, Any],
    context: dict[str, Any],
    base: Any,
    observe: Any,
    refusals: tuple[str, ...] = ("would do nothing",),
    beside: dict[str, dict[str, Any]] | None = None,
) -> tuple[list[str], set[str], set[str]]:
    """(fields whose other value is accepted and changes nothing, those whose other value changes something, those whose
    other value is refused). others: field -> other values; beside: what a field needs to be set with it."""
    idle, working, refused = [], set(), set()
    for name, values in others.items():
        for value in values:
            if value == context.get(name):
                continue
            try:
                changed = observe({**context, **(beside or {}).get(name, {}), name: value})
            except UserError as error:
                if any(words in str(error) for words in refusals):
                    refused.add(name)
                    continue
                raise
            if changed == base:
                idle.append(f"{name}: {value} in {context}")
            else:
                working.add(name)
    return idle, working, refused


def every(section: Any) -> dict[str, Any]:
    """Other values of all fields of a section. Raises KeyError for a field without any."""
    return {name: OTHER[section][name] for name in (field.name for field in fields(section))}


def all_of(section: Any) -> set[str]:
    return {field.name for field in fields(section)}


def test_every_field_of_the_optimizer_acts_or_is_refused() -> None:
    def observe(optimizer: dict[str, Any]) -> tuple[Any, ...]:
        return learned(run_of(optimizer, {}, {}))

    acting = set()
    for context in OPTIMIZERS:
        idle, working, refused = tried(every(OptimizerConfig), context, observe(context), observe, beside=BESIDE)
        assert not idle
        assert refused == REFUSED[context["name"]]
        acting |= working
    assert acting == all_of(OptimizerConfig)  # none is refused everywhere


def test_every_field_of_the_parameterization_acts_or_is_refused() -> None:
    """Every preset with half of the optimizers: each name, and each way to decay, is beside each preset."""
    acting = set()
    for (number, optimizer), (place, name) in product(enumerate(OPTIMIZERS), enumerate(PRESETS)):
        if (number + number // 2 + place) % 2:
            continue

        def observe(parameterization: dict[str, Any], optimizer: dict[str, Any] = optimizer) -> tuple[Any, ...]:
            return learned(run_of(optimizer, parameterization, {}))

        context = {"name": name}
        idle, working, _ = tried(every(ParameterizationConfig), context, observe(context), observe)
        own = (
            f"eps_scaling: {ParameterizationConfig(name=name).resolve().eps_scaling} "  # what a preset has may be said
        )
        assert not [text for text in idle if not text.startswith(own)]
        acting |= working
    assert acting == all_of(ParameterizationConfig)


def test_every_field_of_the_schedule_acts_or_is_refused() -> None:
    def observe(shape: dict[str, Any]) -> list[float]:
        run = run_of({"lr": 0.01}, {}, shape)
        return [schedule(run.schedule, step, run.train.num_steps) for step in range(run.train.num_steps)]

    acting = set()
    for name in SCHEDULES:
        idle, working, _ = tried(every(ScheduleConfig), {"name": name}, observe({"name": name}), observe)
        assert not idle
        acting |= working
    assert acting == all_of(ScheduleConfig)


def computed(model: dict[str, Any]) -> tuple[Any, ...]:
    """All that a model section can change: factors, and the logits of the initial network."""
    raw = {
        **{"model": model, "optimizer": {"lr": 0.01}, "data": {"name": "x", "root": "x", "num_streams": 4}},
        **{"train": {"samples": 4, "global_batch_size": 4}, "parameterization": OF_FAMILY.get(model["family"], {})},
    }
    run = from_plain(RunConfig, raw, "test")
    scaled = build(run.model, run.parameterization, seed=0)
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, run.optimizer)
    factors = [(group["lr"], group["weight_decay"], group.get("eps")) for group in groups]
    images = torch.randn(4, run.model.in_channels, *[run.model.image_size] * 2, generator=torch.Generator())
    logits = scaled.network(images).detach().numpy()
    if mixtures := find_mixtures(scaled.network):
        balance_experts(mixtures)
    balances = [mixture.balance.numpy().tobytes() for mixture in mixtures.values()]
    multipliers = {name: multiplier.value for name, multiplier in scaled.multipliers.items()}
    return multipliers, factors, logits.tobytes(), balances


@pytest.mark.parametrize("section", OF_MODEL)
def test_every_field_of_a_model_acts_or_is_refused(section: Any) -> None:
    contexts, others = OF_MODEL[section]
    others = {**OF_ANY_MODEL, **others}
    assert {"family", *others} == all_of(section)
    acting = {"family"}

    def observe(model: dict[str, Any]) -> tuple[Any, ...]:
        try:
            return computed({**SHAPE, **model})
        except ModelError as error:
            raise UserError(str(error)) from None

    refusals = ("would do nothing", *(OF_OTHER_NETWORKS if section is TimmConfig else ()))
    for context in contexts:
        beside = {} if section is TimmConfig else BESIDE
        idle, working, _ = tried(others, context, observe(context), observe, refusals, beside)
        assert [text.partition(" in ")[0] for text in idle] == IDLE.get(section, [])
        acting |= working
    assert acting == all_of(section) - {text.partition(":")[0] for text in IDLE.get(section, [])}


def test_the_rate_of_every_role_acts_or_is_refused() -> None:
    acting = set()
    for section in (VisionTransformerConfig, MixtureVitConfig, ResNetConfig, ConvResNetConfig):
        model = {**SHAPE, **OF_MODEL[section][0][0]}

        def observe(rates: dict[str, float], model: dict[str, Any] = model) -> list[float]:
            raw = {"model": model, "optimizer": {"lr": 0.01, "role_lr": rates}}
            run = from_plain(RunConfig, {**raw, "data": DATA, "train": {"samples": 4, "global_batch_size": 4}}, "test")
            scaled = build(run.model, run.parameterization, seed=0)
            try:
                groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, run.optimizer)
            except ModelError as error:
                raise UserError(str(error)) from None
            return sorted(group["lr"] for group in groups for _ in group["params"])

        others = {field.name: (2.0,) for field in fields(RoleRates)}
        idle, working, refused = tried(others, {}, observe({}), observe)
        assert not idle
        assert working | refused == all_of(RoleRates)
        acting |= working
    assert acting == all_of(RoleRates) - {"branch_scalar", "gate", "stream_vector"}  # of networks of one's own


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_every_field_of_train_that_is_identity_acts_or_is_refused(
    norm: str, run_settings: dict[str, Any], tmp_path: Path
) -> None:
    numbers = count()
    steps = {"samples": 64, "global_batch_size": 32, "device": "cpu", "log_every": 1}

    def observe(settings: dict[str, Any]) -> tuple[Any, ...]:
        raw = {**run_settings, "model": {**run_settings["model"], "norm": norm}, "train": {**steps, **settings}}
        directory = tmp_path / str(next(numbers))
        result = train(from_plain(RunConfig, raw, "test"), directory)
        weights = [path.read_bytes() for path in sorted(directory.glob("*.safetensors"))]
        return {key: result[key] for key in result if "loss" in key}, timeless_metrics(directory), weights

    others = OTHER[TrainConfig]
    assert set(others) == {field.name for field in fields(TrainConfig) if field.metadata.get("identity", True)}
    acting = set()
    for context in ({}, {"precision": "bf16"}):
        base = observe(context)
        idle, working, _ = tried(others, context, base, observe)
        assert not idle
        acting |= working
    assert acting == others.keys() - ({"batch_norm_images"} if norm == "none" else set())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"name": "adamw", "momentum": 0.8}}, "optimizer: momentum would do nothing: adamw has none"),
        ({"optimizer": {"name": "sgd", "eps": 1e-6}}, "eps would do nothing: sgd has none; .* adamw or muon"),
        ({"optimizer": {"name": "sgd", "nesterov": True, "momentum": 0}}, "nesterov needs a momentum above 0"),
        (
            {"parameterization": {"weight_decay_scaling": 0.5}},
            "weight_decay_scaling would do nothing under adamw with ind",
        ),
        ({"model": {"family": "resnet", "num_groups": 8}}, r"model\.num_groups would do nothing: model\.norm is batch"),
        ({"train": {"evaluate": [], "evaluate_every": 2}}, "evaluate_every would do nothing: evaluate names no split"),
        (
            {"model": {"family": "vit", "depth": 1, "num_heads": 2, "patch_size": 4}, "train": {"drop_path": 0.1}},
            r"train\.drop_path would do nothing: family vit of depth 1 has no residual branch after its first",
        ),
        (
            {"model": {"family": "probabilistic"}, "train": {"drop_path": 0.1}, "parameterization": {"name": "mup"}},
            r"train\.drop_path would do nothing: family probabilistic",
        ),
        ({"train": {"bf16_residual": True}}, "train: bf16_residual would do nothing: precision is fp32"),
        ({"parallel": {"zero_stage": 3}}, "zero_stage would do nothing: engine is auto; .*or use engine deepspeed"),
        ({"track": {"project": "mine"}}, "project would do nothing: wandb is off; leave it out, or use wandb online"),
        ({"schedule": {"decay": 0.3}}, "decay would do nothing: cosine has none; leave it out, or use wsd"),
        (
            {"schedule": {"name": "wsd", "warmup": 0.5, "decay": 0.75}},
            "warmup 0.5 and decay 0.75 are more than the whole",
        ),
        (
            {"parameterization": {"batch_lr": "1/3"}},
            r"batch_lr would do nothing: optimizer\.batch_ratio is 1; leave it",
        ),
        ({"optimizer": {"batch_ratio": 16}}, r"negative: use beta_scaling second, or larger betas"),
    ],
    ids=range(15),
)
def test_what_would_do_nothing_is_refused_in_one_line_with_what_to_do(sections: dict[str, Any], message: str) -> None:
    raw: dict[str, Any] = {
        **{"model": MODEL, "optimizer": {"lr": 0.01}, "data": {"name": "x", "root": "x", "num_streams": 4}},
        "train": {"samples": 80, "global_batch_size": 4},
    }
    if "model" in sections:
        raw["model"] = SHAPE
    with pytest.raises(UserError, match=message) as error:
        from_plain(RunConfig, {**raw, **{key: {**raw.get(key, {}), **sections[key]} for key in sections}}, "test")
    assert "\n" not in str(error.value)


def test_python_code_is_refused_them_where_both_sections_meet() -> None:
    scaled = build(run_of({"lr": 0.01}, {}, {}).model, ParameterizationConfig(adam_depth_lr=0.0), seed=0)
    with pytest.raises(ModelError, match="adam_depth_lr would do nothing under sgd"):
        parameter_groups(scaled.network, scaled.rules, scaled.scale, OptimizerConfig(name="sgd", lr=0.01))


def test_warmup_and_decay_may_share_the_whole_run() -> None:
    for warmup, decay in ((0.9, 0.1), (0.3, 0.7), (0.0, 1.0)):
        shape = run_of({"lr": 0.01}, {}, {"name": "wsd", "warmup": warmup, "decay": decay}).schedule
        factors = [schedule(shape, step, 20) for step in range(20)]
        steps = [abs(a - b) for a, b in pairwise(factors)]
        assert max(steps) <= 1 / (20 * min(warmup or 1, decay)) + 1e-9  # it never jumps


def test_a_study_refuses_a_parameterization_beside_those_that_it_compares(run_settings: dict[str, Any]) -> None:
    study = {"name": "x", "parameterizations": ["sp"], "sizes": [{"width": 8, "depth": 3}], "values": [1, 2, 3]}
    raw = {**run_settings, "parameterization": {"beta": 0.5}, "study": study}
    with pytest.raises(UserError, match=r"parameterization: depth_mup beta=0\.5 would do nothing: study.parameterizat"):
        from_plain(StudyFile, raw, "test")
    from_plain(StudyFile, {**raw, "study": {**study, "parameterizations": [{"beta": 0.5}]}}, "test")
