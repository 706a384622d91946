"""The scaling rules against timm, against the `mup` package and against the published tables, name by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
import mup
import timm
import torch
from torch import nn

from depthmup.models.build import build, build_meta, fill
from depthmup.models.config import (
    AnyModelConfig,
    ConvResNetConfig,
    ResNetConfig,
    Size,
    VisionTransformerConfig,
)
from depthmup.models.coordinate_check import rms
from depthmup.models.errors import ModelError
from depthmup.models.family import ONES, Init, ParameterRule, UnmatchedParameterError, match_rules
from depthmup.models.flops import count_forward_flops, count_training_flops
from depthmup.models.init import init_std
from depthmup.models.named_sizes import NAMED_SIZES
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization import PRESETS, Role, Scale
from depthmup.models.parameterization_config import ParameterizationConfig

VIT = VisionTransformerConfig(
    width=64, depth=4, base_width=32, base_depth=2, num_heads=4, patch_size=8, image_size=32, num_classes=10
)
RESNET = ResNetConfig(width=32, depth=8, base_width=16, base_depth=4, image_size=32, num_classes=10)
CONV_RESNET = ConvResNetConfig(width=16, depth=6, base_width=8, base_depth=3, image_size=8, num_classes=10)
EVERY_MODEL = [
    VIT,
    replace(VIT, num_heads=None, head_dim=16, qk_norm=True, class_token=False, global_pool="avg"),
    replace(VIT, num_heads=None, head_dim=16, timm_name="deit3_small_patch16_224", layer_scale=1e-6),
    *(
        replace(RESNET, preactivation=preactivation, block=block, norm=norm, num_groups=8)
        for preactivation in (False, True)
        for block in ("basic", "bottleneck")
        for norm in ("batch", "group", "none")
    ),
    *(replace(CONV_RESNET, convs_per_branch=k, norm=norm) for k in (1, 2) for norm in ("none", "batch", "layer")),
]


def at_base(config: AnyModelConfig) -> AnyModelConfig:
    return replace(config, width=config.base_width, depth=config.base_depth)


def images(config: AnyModelConfig, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((count, config.in_channels, config.image_size, config.image_size), generator=generator)


@pytest.mark.parametrize("config", EVERY_MODEL, ids=range(len(EVERY_MODEL)))
def test_a_model_of_any_size_trains_one_step_with_few_groups(config: AnyModelConfig) -> None:
    scaled = build(config, ParameterizationConfig(), seed=0)
    optimizer_config = OptimizerConfig(lr=1e-3, weight_decay=0.1)
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, optimizer_config)
    before = {name: p.detach().clone() for name, p in scaled.network.named_parameters()}
    scaled.network(images(config)).square().mean().backward()
    build_optimizer(groups, optimizer_config).step()
    assert all(torch.isfinite(p).all() for p in scaled.network.parameters())
    assert not torch.equal(
        before[f"{scaled.roles.readout}.weight"], scaled.network.get_submodule(scaled.roles.readout).weight
    )
    assert len(groups) <= 8
    assert sum(len(group["params"]) for group in groups) == len(before)


def test_at_base_size_the_network_is_timms_own_bit_for_bit() -> None:
    calls: list[tuple[AnyModelConfig, str, dict[str, Any]]] = [
        (
            at_base(VIT),
            "vit_base_patch16_224",
            {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "img_size": 32},
        ),
        (
            ResNetConfig(width=64, depth=16, base_width=64, base_depth=16, blocks=(3, 4, 6, 3), block="bottleneck"),
            "resnet50",
            {},
        ),
        (ResNetConfig(width=64, depth=8, base_width=64, base_depth=8, blocks=(2, 2, 2, 2)), "resnet18", {}),
        (
            ResNetConfig(
                width=64,
                depth=16,
                base_width=64,
                base_depth=16,
                blocks=(3, 4, 6, 3),
                block="bottleneck",
                preactivation=True,
            ),
            "resnetv2_50",
            {},
        ),
    ]
    for config, name, arguments in calls:
        config = replace(config, num_classes=10, image_size=32)
        scaled = build(config, ParameterizationConfig(name="completep"), seed=0)
        plain = timm.create_model(name, num_classes=10, **arguments)
        plain.load_state_dict(scaled.network.state_dict(), strict=True)
        assert not scaled.multipliers
        assert torch.equal(scaled.network(images(config)), plain(images(config))), name


def test_named_sizes_are_timms_networks() -> None:
    from depthmup.train.config import RunConfig
    from depthmup.train.reading import from_plain

    names = {
        "vit_s16": "vit_small_patch16_224",
        "vit_b16": "vit_base_patch16_224",
        "vit_l16": "vit_large_patch16_224",
        "resnet50": "resnet50",
        "resnet101": "resnet101",
        "resnet152": "resnet152",
    }
    rest = {
        "optimizer": {"lr": 1.0},
        "data": {"name": "x", "root": "x", "num_streams": 1},
        "train": {"samples": 1, "global_batch_size": 1},
    }
    for named, timm_name in names.items():
        model = {"named": named, "base_width": 64, "base_depth": 4}
        config = from_plain(RunConfig, {"model": model, **rest}, "test").model
        network = build_meta(config, ParameterizationConfig()).network
        with torch.device("meta"):
            plain = timm.create_model(timm_name)
        shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
        assert {name: tensor.shape for name, tensor in network.state_dict().items()} == shapes, named


DEPARTURES = {  # from timm's init, with timm's own value; docs/models.md
    "vit_base_patch16_224": {"patch_embed.proj.bias": 768**-0.5 * 3**-0.5},
    "resnet18": {"bn2.weight": 0.0, "fc.bias": 512**-0.5 * 3**-0.5},
    "resnet50": {"bn3.weight": 0.0, "fc.bias": 2048**-0.5 * 3**-0.5},
    "resnetv2_50": {},
}


@pytest.mark.parametrize("name", DEPARTURES)
def test_the_base_has_timms_init_but_for_what_the_page_says(name: str) -> None:
    """By the RMS of each parameter; biases of a few numbers are left a wide margin."""
    shape = {"num_classes": 10, "image_size": 64, "width": 64, "base_width": 64}
    config: AnyModelConfig
    if name == "vit_base_patch16_224":
        config = replace(at_base(VIT), width=192, base_width=192, patch_size=16, image_size=64)
        plain = timm.create_model(name, num_classes=10, embed_dim=192, depth=2, num_heads=4, img_size=64)
        assert {n for n, _ in plain.named_parameters()} & plain.no_weight_decay() == {"cls_token", "pos_embed"}
    else:
        blocks, block = ((2, 2, 2, 2), "basic") if name == "resnet18" else ((3, 4, 6, 3), "bottleneck")
        depth = {"depth": sum(blocks), "base_depth": sum(blocks)}
        config = ResNetConfig(**shape, **depth, blocks=blocks, block=block, preactivation="v2" in name)
        plain = timm.create_model(name, num_classes=10)
    ours = dict(build(config, ParameterizationConfig(), seed=0).network.named_parameters())
    found = set()
    for parameter, theirs in plain.named_parameters():
        known = [end for end in DEPARTURES[name] if parameter.endswith(end)]
        if known:
            assert rms(theirs.detach()) == pytest.approx(DEPARTURES[name][known[0]], rel=0.5), parameter
            assert rms(ours[parameter].detach()) in (0, 1)
            found.update(known)
        else:
            here, there = rms(ours[parameter].detach()), rms(theirs.detach())
            assert here == pytest.approx(there, rel=0.1 + 2 * theirs.numel() ** -0.5), parameter
    assert found == set(DEPARTURES[name])


def test_what_timm_does_not_decay_is_not_decayed() -> None:
    config = replace(VIT, timm_name="vit_medium_patch16_reg4_gap_256", layer_scale=0.0)
    config = replace(config, class_token=True, global_pool="token")
    scaled = build_meta(config, ParameterizationConfig())
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, OptimizerConfig(lr=1.0, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in scaled.network.named_parameters()}
    undecayed = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    spared = {name for name in names.values() if name in scaled.network.no_weight_decay()}
    assert spared >= {"cls_token", "pos_embed"}  # and reg_token, in newer versions of timm
    assert spared <= undecayed
    assert {name for name in names.values() if name.endswith("weight") and "norm" not in name}.isdisjoint(undecayed)
    assert len(groups) <= 8


def mup_network(config: AnyModelConfig) -> nn.Module:
    """The plain network of `config` with the readout that `mup` asks for."""
    network = build(config, ParameterizationConfig(name="sp"), seed=0).network
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if name in ("head", "fc") and isinstance(child, nn.Linear):
                setattr(module, name, mup.MuReadout(child.in_features, child.out_features))
            if isinstance(child, nn.Module):
                child._forward_pre_hooks.clear()
                child._forward_hooks.clear()
    return network


@pytest.mark.parametrize(
    "config", [VIT, replace(VIT, num_heads=None, head_dim=16, qk_norm=True), RESNET], ids=("vit", "qk", "resnet")
)
def test_width_rules_are_those_of_the_mup_package(config: AnyModelConfig) -> None:
    config = replace(config, depth=config.base_depth)
    scaled = build_meta(config, ParameterizationConfig(name="mup"))
    base, delta = (
        mup_network(replace(config, width=config.base_width * k, base_width=config.base_width)) for k in (1, 3)
    )
    theirs = mup.set_base_shapes(mup_network(config), base, delta=delta, rescale_params=False)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}

    ratio = config.width / config.base_width
    assert scaled.multipliers[scaled.roles.readout].value == 1 / theirs.get_submodule(scaled.roles.readout).width_mult()
    for name, optimizer in (("sgd", mup.MuSGD), ("adamw", mup.MuAdamW)):
        their_groups = optimizer(theirs.parameters(), lr=0.1, weight_decay=1.0).param_groups
        their_lr = {names[id(p)]: group["lr"] for group in their_groups for p in group["params"]}
        ours = parameter_groups(scaled.network, scaled.rules, scaled.scale, OptimizerConfig(name=name, lr=0.1))
        our_names = {id(p): n for n, p in scaled.network.named_parameters()}
        our_lr = {our_names[id(p)]: group["lr"] for group in ours for p in group["params"]}
        assert {group["eps"] for group in (*ours, *their_groups) if "eps" in group} <= {1e-8}, name
        assert our_lr == pytest.approx(their_lr), name
        assert len(set(our_lr.values())) > 1

    initialisers = {
        "normal": lambda p, s: mup.init.normal_(p, std=s),
        "normal_fan_out": lambda p, s: mup.init.kaiming_normal_(p, mode="fan_out", nonlinearity="relu"),
        "uniform_fan_in": lambda p, s: mup.init.kaiming_uniform_(p, a=5**0.5),
    }
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        rule = scaled.rules[name]
        if rule.init.kind == "constant":
            continue
        draws = []
        for _ in range(max(1, 20_000 // parameter.numel())):
            initialisers[rule.init.kind](parameter, rule.init.scale)
            draws.append(parameter.detach().flatten().clone())
        assert torch.cat(draws).std().item() == pytest.approx(
            init_std(parameter.shape, rule, scaled.scale), rel=0.04
        ), name
    assert ratio == 2


def test_completep_gives_the_published_table() -> None:
    """CompleteP (2505.01618), table 1, at m_N = 4 and m_L = 8."""
    N, L = 4.0, 8.0
    scale = Scale(PRESETS["completep"], N, L)
    hidden, norm = scale.factors(Role.BRANCH_HIDDEN, "adamw"), scale.factors(Role.BRANCH_VECTOR, "adamw")
    assert scale.branch_multiplier() == 1 / L
    assert scale.readout_multiplier() == 1 / N
    assert (hidden.lr, hidden.eps, hidden.weight_decay) == (1 / N, 1 / (N * L), N)
    assert (norm.lr, norm.weight_decay) == (1, 0)
    assert scale.init_variance(Role.BRANCH_HIDDEN) == 1 / N
    for role in (Role.INPUT, Role.VECTOR, Role.READOUT):
        factors = scale.factors(role, "adamw")
        assert (factors.lr, factors.eps, scale.init_variance(role)) == (1, 1, 1), role


def test_the_papers_absolute_form_is_the_relative_form() -> None:
    """beta / sqrt(L) and lr / sqrt(L) with a base of depth 1 is the model of base depth 2 with the base's constants."""
    depth, base_depth, beta, lr = 12, 3, 0.7, 0.01
    absolute = Scale(replace(PRESETS["depth_mup"], beta=beta * base_depth**0.5), 1, depth)
    relative = Scale(replace(PRESETS["depth_mup"], beta=beta), 1, depth / base_depth)
    assert absolute.branch_multiplier() == pytest.approx(beta * base_depth**0.5 / depth**0.5)
    assert absolute.branch_multiplier() == pytest.approx(relative.branch_multiplier())
    absolute_lr = lr * base_depth**0.5 * absolute.factors(Role.BRANCH_HIDDEN, "adamw").lr
    assert absolute_lr == pytest.approx(lr * relative.factors(Role.BRANCH_HIDDEN, "adamw").lr)
    assert absolute.factors(Role.BRANCH_HIDDEN, "sgd").lr == 1  # 2309.16620: SGD needs no depth factor at alpha = 1/2


def test_presets_without_depth_rules_ignore_depth_and_sp_ignores_width() -> None:
    for name in ("sp", "mup"):
        for role in Role:
            for optimizer in ("sgd", "adamw", "muon"):
                assert Scale(PRESETS[name], 4, 1).factors(role, optimizer) == Scale(PRESETS[name], 4, 9).factors(
                    role, optimizer
                )
        assert Scale(PRESETS[name], 4, 9).branch_multiplier() == 1
        assert Scale(PRESETS[name], 4, 9).attention_multiplier() == 1  # unless it is said, the head dim does not grow
    sp = Scale(PRESETS["sp"], 4, 9, 4)
    assert (sp.readout_multiplier(), sp.attention_multiplier()) == (1, 1)
    assert {sp.factors(role, "adamw").lr for role in Role} == {1}


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_gamma0_moves_the_features_in_proportion_and_the_logits_not_at_all(name: str) -> None:
    """To first order in the learning rate, over two steps, with an eps of AdamW that is felt."""
    optimizer_config = OptimizerConfig(name=name, lr=1e-6, **({} if name == "sgd" else {"eps": 1e-3}))

    def moved(gamma0: float) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = build(VIT, ParameterizationConfig(gamma0=gamma0), seed=0)
        network: Any = scaled.network.double()
        groups = parameter_groups(network, scaled.rules, scaled.scale, optimizer_config)
        optimizer = build_optimizer(groups, optimizer_config)

        def features_and_logits() -> tuple[torch.Tensor, torch.Tensor]:
            features = network.forward_head(network.forward_features(images(VIT).double()), pre_logits=True)
            return features, network.head(features)

        before = [tensor.detach() for tensor in features_and_logits()]
        for _ in range(2):
            optimizer.zero_grad()
            logits = features_and_logits()[1] - before[1]  # initial logits depend on gamma0, and gradients on them
            nn.functional.cross_entropy(logits, torch.tensor([3, 7])).backward()
            optimizer.step()
        features, logits = (after.detach() - b for after, b in zip(features_and_logits(), before, strict=True))
        return features, logits

    features, logits = moved(1.0)
    for gamma0 in (1 / 4, 4.0):
        features_then, logits_then = moved(gamma0)
        assert rms(features_then - gamma0 * features) <= 1e-2 * gamma0 * rms(features)
        assert rms(logits_then - logits) <= 1e-2 * rms(logits)


def test_muon_trains_matrices_and_adamw_the_rest_through_a_checkpoint() -> None:
    config = OptimizerConfig(name="muon", lr=0.01, momentum=0.95)

    def train(steps: int, saved: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
        scaled = build(VIT, ParameterizationConfig(), seed=0)
        optimizer = build_optimizer(parameter_groups(scaled.network, scaled.rules, scaled.scale, config), config)
        if saved:
            scaled.network.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        for _ in range(steps):
            optimizer.zero_grad()
            scaled.network(images(VIT)).square().sum().backward()
            optimizer.step()
        names = {id(p): n for n, p in scaled.network.named_parameters()}
        by_muon = {names[id(p)] for g in optimizer.param_groups if g["algorithm"] == "muon" for p in g["params"]}
        assert by_muon == {
            n for n in names.values() if n.startswith("blocks") and n.endswith("weight") and "norm" not in n
        }
        return scaled.network.state_dict(), optimizer.state_dict()

    straight, resumed = train(4)[0], train(2, train(2))[0]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    conv = build_meta(CONV_RESNET, ParameterizationConfig())
    with pytest.raises(ValueError, match="muon has no rule for Linear"):
        parameter_groups(conv.network.fc, {n: conv.rules[f"fc.{n}"] for n in ("weight", "bias")}, conv.scale, config)


@pytest.mark.parametrize(("model", "kernels"), [(CONV_RESNET, {3}), (replace(RESNET, image_size=8), {1, 3})])
def test_muon_trains_convolutions_as_matrices_through_a_checkpoint(model: AnyModelConfig, kernels: set[int]) -> None:
    """In channels_last, in which flattening a weight copies it, but for one of a single pixel."""
    config = OptimizerConfig(name="muon", lr=0.01, momentum=0.95)

    def train(steps: int, saved: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
        scaled = build(model, ParameterizationConfig(), seed=0)
        scaled.network.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(parameter_groups(scaled.network, scaled.rules, scaled.scale, config), config)
        groups = [group for group in optimizer.param_groups if group["algorithm"] == "muon"]
        assert {p.shape[2] for group in groups for p in group["params"]} == kernels
        group = groups[0]
        if saved:
            scaled.network.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        weight = group["params"][0]
        flat = torch.nn.Parameter(weight.detach().flatten(1).clone())
        settings = {"weight_decay": group["weight_decay"], "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        torchs_own = torch.optim.Muon([flat], lr=group["lr"], **settings)
        for _ in range(steps):
            optimizer.zero_grad()
            scaled.network(images(model)).square().sum().backward()
            optimizer.step()
            flat.grad = weight.grad.flatten(1)
            torchs_own.step()
            if not saved:  # its momentum begins anew
                torch.testing.assert_close(weight.detach().flatten(1), flat.detach())
        assert optimizer.state[weight]["momentum_buffer"].shape == weight.shape
        return scaled.network.state_dict(), optimizer.state_dict()

    straight, resumed = train(4)[0], train(2, train(2))[0]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    shallow = build(replace(VIT, depth=2), ParameterizationConfig(name="mup"), seed=3).network.state_dict()
    deep = build(replace(VIT, depth=4), ParameterizationConfig(name="mup"), seed=3).network.state_dict()
    torch.randn(7)  # the global generator plays no part
    assert all(torch.equal(shallow[name], deep[name]) for name in shallow)
    other = build(replace(VIT, depth=2), ParameterizationConfig(name="mup"), seed=4).network.state_dict()
    assert not torch.equal(shallow["head.weight"], other["head.weight"])


def test_a_network_whose_modules_are_taken_one_by_one_is_never_whole_and_has_the_same_weights() -> None:
    expected = build(VIT, ParameterizationConfig(), seed=3).network.state_dict()
    scaled = build_meta(VIT, ParameterizationConfig())
    modules = scaled.network.modules()
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in modules)
    taken, most = dict[str, torch.Tensor](), 0

    def take(module: nn.Module) -> None:
        nonlocal most
        most = max(most, sum(p.numel() for p in scaled.network.parameters() if not p.is_meta))
        name = next(name for name, each in scaled.network.named_modules() if each is module)
        for key, parameter in module.named_parameters(name, recurse=False):
            taken[key] = parameter.detach().clone()
            parameter.data = torch.empty(0)

    fill(scaled, 3, "cpu", take=take)
    assert taken.keys() == dict(scaled.network.named_parameters()).keys()
    assert all(torch.equal(taken[name], expected[name]) for name in taken)
    assert most == largest


def test_a_forgotten_parameter_or_buffer_is_an_error() -> None:
    for forget in (
        lambda network: network.register_buffer("table", torch.zeros(3, device="meta"), persistent=False),
        lambda network: network.register_parameter("table", nn.Parameter(torch.zeros(3, device="meta"))),
    ):
        scaled = build_meta(VIT, ParameterizationConfig())
        forget(scaled.network)
        with pytest.raises(RuntimeError, match="no initialiser filled table"):
            fill(scaled, 0, "cpu")


def test_a_name_with_no_role_or_with_two_is_an_error() -> None:
    rules = build_meta(VIT, ParameterizationConfig()).roles.parameters
    with pytest.raises(UnmatchedParameterError, match=r"blocks\.0\.extra: no rule .*"):
        match_rules(["head.weight", "blocks.0.extra"], rules)
    with pytest.raises(UnmatchedParameterError, match=r"head\.weight: matched by"):
        match_rules(["head.weight"], (*rules, *rules))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParameterizationConfig(name="depthmup"), "ParameterizationConfig.name: .* 'depth_mup'.*'depthmup'"),
        (lambda: ParameterizationConfig(bta=1.0), "ParameterizationConfig.bta: unknown; known: name, .*, beta, gamma0"),
        (
            lambda: ParameterizationConfig(name="mup", alpha=1.0),
            "alpha would do nothing: mup has no .* use depth_mup or",
        ),
        (
            lambda: ParameterizationConfig(name="sp", adam_depth_lr=0.0),
            "adam_depth_lr would do nothing: sp has no depth",
        ),
        (lambda: OptimizerConfig(name="lion", lr=1.0), "OptimizerConfig.name: .* 'sgd', 'adamw' or 'muon'"),
        (lambda: OptimizerConfig(lr=0), "OptimizerConfig.lr: Input should be greater than 0"),
        (lambda: replace(RESNET, norm="batchnorm"), "ResNetConfig.norm: .* 'batch', 'group' or 'none'"),
        (lambda: replace(VIT, width=-64), "VisionTransformerConfig.width: Input should be greater than 0 .*-64"),
        (lambda: Size(width=64, depth=0), "Size.depth: Input should be greater than 0"),
        (lambda: Init("norml", 1.0), "Init.kind: Input should be 'constant', 'normal', .*'norml'"),
        (lambda: ParameterRule("fc", "hiden", ONES), "ParameterRule.role: Input should be 'input', 'branch_hidden'"),
    ],
    ids=range(11),
)
def test_python_code_is_refused_a_wrong_value_as_a_file_is(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_bad_sizes_and_names_are_refused_with_what_would_do() -> None:
    with pytest.raises(ValueError, match="width 40 must be a multiple of head_dim 16: use 32 or 48"):
        replace(VIT, num_heads=None, head_dim=16, width=40)
    with pytest.raises(ValueError, match="depth 6 must be a multiple of the blocks"):
        replace(RESNET, depth=6)
    with pytest.raises(ValueError, match="base_depth 3 must be at least 4: a block in each stage"):
        replace(RESNET, base_depth=3)
    with pytest.raises(ValueError, match="depth 4 must be a multiple of num_stages 3: use 3 or 6"):
        replace(CONV_RESNET, depth=4)


@pytest.mark.parametrize(
    ("timm_name", "stated", "message"),
    [
        ("vit_smal_patch16_224", {}, "unknown to timm; nearest: vit_small_patch16_224"),
        ("vit_relpos_small_patch16_224", {}, "no plain ViT .* nearest: vit_small_patch16_224"),
        (
            "vit_base_patch16_224.augreg_in21k",
            {},
            "a tag of weights, which are not loaded; nearest: vit_base_patch16_224",
        ),
        ("deit3_small_patch16_224", {}, "state its initial value"),
        ("vit_base_patch16_siglip_224", {}, "attention pooling, .*: state model.global_pool: avg"),
        (
            "vit_base_patch16_siglip_224",
            {"global_pool": "token"},
            "cannot build vit_base_patch16_siglip_224 with these",
        ),
        ("vit_base_patch16_xp_224", {}, "ParallelScalingBlock.*: start from vit_base_patch16_224"),
        ("vit_dwee_patch16_reg1_gap_256", {}, "DiffAttention.*: start from vit_base_patch16_224"),
        ("deit_small_distilled_patch16_224", {}, "a second readout .*: start from vit_base_patch16_224"),
    ],
    ids=range(9),
)
def test_a_timm_name_without_rules_is_refused_with_what_to_do_instead(
    timm_name: str, stated: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build_meta(replace(VIT, timm_name=timm_name, **stated), ParameterizationConfig())


def test_every_plain_vit_of_timm_is_a_starting_point() -> None:
    special = ("_xp_", "_18x2_", "_rpn_", "_dlittle_", "_dwee_", "_dpwee_", "_pwee_", "_distilled_")
    names = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
    for name in names:
        if not any(part in name for part in special):
            stated = {"layer_scale": 0.1, "class_token": False, "global_pool": "avg", "patch_size": 8}
            build_meta(replace(VIT, timm_name=name, width=32, depth=2, **stated), ParameterizationConfig())


def test_a_base_larger_than_the_model_is_allowed_and_scales_down() -> None:
    small = replace(VIT, width=16, depth=1)
    scaled = build_meta(small, ParameterizationConfig())
    assert (scaled.scale.width_ratio, scaled.scale.depth_ratio) == (1 / 2, 1 / 2)
    assert scaled.scale.branch_multiplier() == pytest.approx(2**0.5)
    assert scaled.scale.readout_multiplier() == 2
    assert scaled.scale.factors(Role.BRANCH_HIDDEN, "adamw").lr == pytest.approx(2 * 2**0.5)


def test_flops_are_the_published_multiply_adds_of_vit_b16_and_resnet50() -> None:
    """17.6 (DeiT, 2012.12877) and 4.1 (2110.00476) billion multiply-adds at 224 pixels, and a count by hand."""
    width, tokens = 768, 197
    vit = 12 * (12 * tokens * width**2 + 2 * tokens**2 * width) + 196 * 768 * width + width * 1000
    resnet, channels = 112**2 * 64 * 3 * 7**2 + 2048 * 1000, 64
    for stage, (blocks, size) in enumerate(((3, 56), (4, 28), (6, 14), (3, 7))):
        inner, before = 64 * 2**stage, size if stage == 0 else 2 * size  # the 3x3 conv has the stride
        for block in range(blocks):
            resnet += (before if block == 0 else size) ** 2 * channels * inner
            resnet += size**2 * (9 * inner**2 + 4 * inner**2 + (4 * inner * channels if block == 0 else 0))
            channels = 4 * inner
    classes = {"vit": VisionTransformerConfig, "resnet": ResNetConfig}
    for named, by_hand, published in (("vit_b16", vit, 17.6e9), ("resnet50", resnet, 4.1e9)):
        row = {key: tuple(value) if isinstance(value, list) else value for key, value in NAMED_SIZES[named].items()}
        config = classes[row["family"]](**row, base_width=64, base_depth=4)
        network = build_meta(config, ParameterizationConfig()).network
        assert count_forward_flops(network, (3, 224, 224)) == 2 * by_hand, named
        assert by_hand == pytest.approx(published, rel=0.01)
        assert count_training_flops(network, (3, 224, 224)) == 6 * by_hand


def test_flops_of_a_vit_are_its_matrix_products_attention_included() -> None:
    D, T, depth, classes, patch = 64, 17, 4, 10, 8
    block = 2 * T * (12 * D * D) + 2 * 2 * T * T * D  # qkv, proj, mlp; then q k' and attention times v
    forward = depth * block + 2 * (T - 1) * D * 3 * patch**2 + 2 * D * classes
    assert count_training_flops(build_meta(VIT, ParameterizationConfig()).network, (3, 32, 32)) == 3 * forward
