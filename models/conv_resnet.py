"""The paper's convolutional ResNet: constant width, no normalisation by default, k convs per residual branch.

    stem conv3x3 -> stages of blocks, max-pool between stages -> mean pool -> readout
    block:  x + branch_multiplier * ([norm] -> ReLU or tanh -> conv3x3) repeated k times

Bordelon et al. (arXiv 2309.16620), section 2 and appendix on the experiments. Without normalisation the effect of
depth on the learning rate is in plain sight, which is why this net is the first evidence for or against a transfer.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthmup.models.config import ConvResNetConfig
from depthmup.models.family import ONES, ZEROS, Family, Init, ParameterRule, Roles, Slot
from depthmup.models.parameterization import Role


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a (batch, channels, height, width) tensor."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (batch, height, width, channels)
        return super().forward(x).permute(0, 3, 1, 2)


NORMS = {"none": nn.Identity, "batch": nn.BatchNorm2d, "layer": ChannelLayerNorm}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh}


class Block(nn.Module):
    """x + drop_path(branch(x)); the slot `drop_path` is where the branch multiplier sits."""

    def __init__(self, width: int, convs: int, norm: str, activation: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(NORMS[norm](width) for _ in range(convs))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(convs))
        self.drop_path = nn.Identity()
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            branch = conv(self.activation(norm(branch)))
        return x + self.drop_path(branch)  # (batch, width, height, width)


class ConvResNet(nn.Module):
    """(batch, in_channels, image_size, image_size) images -> (batch, num_classes) logits."""

    def __init__(self, config: ConvResNetConfig) -> None:
        super().__init__()
        self.stem = nn.Conv2d(config.in_channels, config.width, 3, padding=1, bias=False)
        blocks_per_stage = config.depth // config.num_stages
        block = partial(Block, config.width, config.convs_per_branch, config.norm, config.activation)
        self.stages = nn.ModuleList(
            nn.Sequential(*(block() for _ in range(blocks_per_stage))) for _ in range(config.num_stages)
        )
        self.activation = ACTIVATIONS[config.activation]
        self.fc = nn.Linear(config.width, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # (batch, width, height, width)
        for index, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if index else x)
        return self.fc(self.activation(x).mean((2, 3)))  # (batch, num_classes)


def roles(config: ConvResNetConfig) -> Roles:
    """The role and the base's initial values of each parameter, and the branch of each block: the paper's network
    (2309.16620, appendix B), in which every layer preserves the scale of its input.

    | parameter            | shape               | initial values of the base |
    |----------------------|---------------------|----------------------------|
    | stem                 | (N, channels, 3, 3) | normal, std fan_in^-1/2    |
    | blocks' convolutions | (N, N, 3, 3)        | normal, std fan_in^-1/2    |
    | norms                | (N,)                | 1                          |
    | fc.weight            | (classes, N)        | normal, std fan_in^-1/2    |
    | all biases           | (outputs,)          | 0                          |
    """
    block = r"stages\.\d+\.\d+"
    return Roles(
        parameters=(
            ParameterRule(r"stem\.weight", Role.INPUT, Init("normal_fan_in", 1.0)),
            ParameterRule(rf"{block}\.convs\.\d+\.weight", Role.BRANCH_HIDDEN, Init("normal_fan_in", 1.0)),
            ParameterRule(rf"{block}\.norms\.\d+\.weight", Role.BRANCH_VECTOR, ONES),
            ParameterRule(rf"{block}\.norms\.\d+\.bias", Role.BRANCH_VECTOR, ZEROS),
            ParameterRule(r"fc\.weight", Role.READOUT, Init("normal_fan_in", 1.0)),
            ParameterRule(r"fc\.bias", Role.SCALAR, ZEROS),
        ),
        branches=(Slot(rf"({block})\.drop_path", rf"\1.convs.{config.convs_per_branch - 1}"),),
        readout="fc",
        blocks=block,
    )


CONV_RESNET = Family(name="conv_resnet", build=ConvResNet, roles=roles)
