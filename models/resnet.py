"""timm's ResNet and pre-activation ResNetV2 as a family, at any width: `width` channels in the stem and first stage.

The stages have width, 2 width, 4 width and 8 width channels (4 times that at the end of a bottleneck), so that width 64
is timm's own net. The one residual branch of a block ends in timm's slot `drop_path`.
"""

from functools import partial
from typing import Any

from torch import nn

from depthmup.models.config import ResNetConfig
from depthmup.models.family import ONES, ZEROS, Family, Init, ParameterRule, Roles, Slot
from depthmup.models.parameterization import Role


def build(config: ResNetConfig) -> nn.Module:
    import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)

    return build_v2(config) if config.preactivation else build_v1(config)


def build_v1(config: ResNetConfig) -> nn.Module:
    """timm's ResNet, whose plain stem is 64 channels wide whatever the stages are: wider or narrower, it is remade."""
    from timm.layers import GroupNorm
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet, make_blocks

    norms: dict[str, Any] = {
        "batch": nn.BatchNorm2d,
        "group": partial(GroupNorm, num_groups=config.num_groups),
        "none": nn.Identity,
    }
    block: Any = Bottleneck if config.block == "bottleneck" else BasicBlock
    channels = tuple(config.width * 2**stage for stage in range(4))
    network: Any = ResNet(
        block,
        config.blocks_per_stage,
        config.num_classes,
        config.in_channels,
        channels=channels,
        norm_layer=norms[config.norm],
    )
    if config.width != network.conv1.out_channels:
        network.conv1 = nn.Conv2d(config.in_channels, config.width, 7, stride=2, padding=3, bias=False)
        network.bn1 = norms[config.norm](config.width)
        stages, _ = make_blocks(
            (block,) * 4,
            channels,
            config.blocks_per_stage,
            config.width,
            act_layer=nn.ReLU,
            norm_layer=norms[config.norm],
        )
        network.layer1 = stages[0][1]
    for module in network.modules():
        if isinstance(module, block):
            module.drop_path = nn.Identity()  # timm leaves the slot None without stochastic depth
    return network


def activation(num_channels: int, apply_act: bool = True, **unused: Any) -> nn.Module:
    """What stands in for timm's norm-with-activation layer in a net without norms."""
    return nn.ReLU(inplace=True) if apply_act else nn.Identity()


def build_v2(config: ResNetConfig) -> nn.Module:
    """timm's ResNetV2, whose blocks begin with norm and activation, at this width and these blocks per stage."""
    from timm.layers import BatchNormAct2d, GroupNormAct, create_conv2d
    from timm.models.resnetv2 import ResNetV2

    norms: dict[str, Any] = {
        "batch": BatchNormAct2d,
        "group": partial(GroupNormAct, num_groups=config.num_groups),
        "none": activation,
    }
    bottleneck = config.block == "bottleneck"
    return ResNetV2(
        list(config.blocks_per_stage),
        channels=tuple(config.width * 2**stage * (4 if bottleneck else 1) for stage in range(4)),
        num_classes=config.num_classes,
        in_chans=config.in_channels,
        stem_chs=config.width,
        basic=not bottleneck,
        bottle_ratio=0.25 if bottleneck else 1.0,
        norm_layer=norms[config.norm],
        conv_layer=create_conv2d,
    )


KAIMING = Init("normal_fan_out", 2**0.5)  # timm's init of every conv


def roles(config: ResNetConfig) -> Roles:
    """The role and the base's initial values of each parameter of timm's ResNets, and the branch of each block.

    | parameter              | shape                        | initial values of the base                           |
    |------------------------|------------------------------|------------------------------------------------------|
    | stem                   | (N, channels, k, k)          | normal, std (2 / fan_out)^1/2: Kaiming               |
    | blocks' convolutions   | (multiples of N, .., k, k)   | normal, std (2 / fan_out)^1/2: Kaiming               |
    | shortcut's convolution | (multiples of N, .., 1, 1)   | normal, std (2 / fan_out)^1/2: Kaiming               |
    | norms                  | (multiples of N,)            | 1; timm: 0 for a branch's last one                   |
    | fc.weight              | (classes, 8 N or 32 N)       | uniform, std (3 fan_in)^-1/2; head.fc: normal 0.01   |
    | all biases             | (outputs,)                   | 0                                                    |
    """
    last = 3 if config.block == "bottleneck" else 2
    if config.preactivation:
        block, stem, stem_norm, norm, shortcut = r"stages\.\d+\.blocks\.\d+", r"stem\.conv", "norm", "norm", "conv"
        readout, readout_init = "head.fc", Init("normal", 0.01)
        ends_in_norm = False
    else:
        block, stem, stem_norm, norm, shortcut = r"layer\d+\.\d+", "conv1", "bn1", "bn", "0"
        readout, readout_init = "fc", Init("uniform_fan_in", 3**-0.5)
        ends_in_norm = config.norm != "none"
    name = readout.replace(".", r"\.")
    return Roles(
        parameters=(
            ParameterRule(rf"{stem}\.weight", Role.INPUT, KAIMING),
            ParameterRule(rf"{stem_norm}\.weight", Role.VECTOR, ONES),
            ParameterRule(rf"{stem_norm}\.bias", Role.VECTOR, ZEROS),
            ParameterRule(rf"{block}\.conv\d\.weight", Role.BRANCH_HIDDEN, KAIMING),
            ParameterRule(rf"{block}\.{norm}\d\.weight", Role.BRANCH_VECTOR, ONES),
            ParameterRule(rf"{block}\.{norm}\d\.bias", Role.BRANCH_VECTOR, ZEROS),
            ParameterRule(rf"{block}\.downsample\.{shortcut}\.weight", Role.HIDDEN, KAIMING),
            ParameterRule(rf"{block}\.downsample\.1\.weight", Role.VECTOR, ONES),
            ParameterRule(rf"{block}\.downsample\.1\.bias", Role.VECTOR, ZEROS),
            ParameterRule(rf"{name}\.weight", Role.READOUT, readout_init),
            ParameterRule(rf"{name}\.bias", Role.SCALAR, ZEROS),
        ),
        branches=(Slot(rf"({block})\.drop_path", rf"\1.{norm if ends_in_norm else 'conv'}{last}"),),
        readout=readout,
        blocks=block,
    )


RESNET = Family(name="resnet", build=build, roles=roles)
