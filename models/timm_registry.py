"""How timm.create_model makes each of the families, and the entries it lacks. Importing this module registers them."""

from typing import Any

from torch import nn

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
from timm.models import load_pretrained, register_model

from depthmup.models.config import (
    AnyModelConfig,
    ConvResNetConfig,
    MixtureVitConfig,
    ProbabilisticConfig,
    ResNetConfig,
    TimmConfig,
    VisionTransformerConfig,
)
from depthmup.models.conv_resnet import ConvResNet
from depthmup.models.errors import ModelError
from depthmup.models.moe_vit import build as build_moe_vit
from depthmup.models.moe_vit import find_mixtures
from depthmup.models.resnet import build as build_resnet
from depthmup.models.timm_family import find_plain_call
from depthmup.models.vit import list_timm_arguments


@register_model
def depthmup_conv_resnet(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The paper's net. `arguments` are ConvResNetConfig's, those of the base size left out."""
    network = ConvResNet(ConvResNetConfig(**add_base_arguments(arguments)))
    return finish_as_timm(network, pretrained, arguments)


@register_model
def depthmup_resnet(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """timm's ResNet or ResNetV2 at any width. `arguments` are ResNetConfig's, those of the base size left out."""
    network = build_resnet(ResNetConfig(**add_base_arguments(arguments)))
    return finish_as_timm(network, pretrained, arguments)


@register_model
def depthmup_moe_vit(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """timm's ViT with mixtures of experts. `arguments` are MixtureVitConfig's, those of the base size left out."""
    network = build_moe_vit(MixtureVitConfig(**add_base_arguments(arguments)))
    for module in find_mixtures(network).values():
        module.reset_running_stats()
    return finish_as_timm(network, pretrained, arguments)


def add_base_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """timm adds arguments of its own, about pretrained weights; a plain network is its own base."""
    own = {key: value for key, value in arguments.items() if not key.startswith(("pretrained", "cache_dir"))}
    return own | {"base_width": own["width"], "base_depth": own["depth"]}


def finish_as_timm(network: nn.Module, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    """The network with the pretrained_cfg from which timm.data.resolve_model_data_config takes its preprocessing, and,
    if `pretrained`, with the weights that it names: those of 'local-dir:' or of the hub."""
    given = arguments.get("pretrained_cfg") or {}
    overlay = arguments.get("pretrained_cfg_overlay") or {}
    found = (given if isinstance(given, dict) else given.to_dict()) | overlay
    network.pretrained_cfg = found  # type: ignore[assignment]  # as timm does
    if pretrained:
        channels = found["input_size"][0] if "input_size" in found else 3
        classes = found.get("num_classes", 1000)
        load_pretrained(network, found, classes, channels, cache_dir=arguments.get("cache_dir"))
    return network


def find_timm_call(config: AnyModelConfig) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which timm.create_model makes the plain network of `config`. Raises ModelError for one
    that has no plain network."""
    if type(config) is VisionTransformerConfig:
        return config.timm_name, list_timm_arguments(config)
    if isinstance(config, ProbabilisticConfig):
        raise ModelError("cannot export: the factor N on probabilities has no weight to go into (family probabilistic)")
    if isinstance(config, TimmConfig):
        return find_plain_call(config)
    if isinstance(config, ResNetConfig) and config.width == 64 and config.norm == "batch" and not config.preactivation:
        arguments = {"num_classes": config.num_classes, "in_chans": config.in_channels}
        name = "resnet50" if config.block == "bottleneck" else "resnet18"
        return name, {"layers": list(config.blocks_per_stage), **arguments}
    stated = {key: v for key, v in vars(config).items() if key != "family" and not key.startswith("base_")}
    return f"depthmup_{config.family}", stated
