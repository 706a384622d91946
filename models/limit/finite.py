"""The finite network beside its limit: a residual network with one layer a branch, under this package's rules.

    h^1 = W^0 x,   h^(l+1) = h^l + branch multiplier * W^l phi(h^l),   f = w . phi(h^(L+1)) * readout multiplier

trained by full-batch gradient descent, its rules and optimizer those of any network here.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from depthmup.models.build import ScaledModel, apply
from depthmup.models.config import Size
from depthmup.models.family import Init, ParameterRule, Roles, Slot
from depthmup.models.limit.network import ActivationName
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization import Role
from depthmup.models.parameterization_config import ParameterizationConfig

FUNCTIONS = {"relu": torch.relu, "tanh": torch.tanh, "erf": torch.erf, "linear": lambda x: x}
FAN_IN = Init("normal_fan_in", 1.0)
ROLES = Roles(
    parameters=(
        ParameterRule(r"stem\.weight", Role.INPUT, FAN_IN),
        ParameterRule(r"branches\.\d+\.weight", Role.BRANCH_HIDDEN, FAN_IN),
        ParameterRule(r"readout\.weight", Role.READOUT, FAN_IN),
    ),
    branches=(Slot(r"(branches\.\d+)", r"\1"),),
    readout="readout",
)


class ResidualNet(nn.Module):
    """(P, inputs) -> (P,)."""

    def __init__(self, inputs: int, size: Size, activation: ActivationName = "relu") -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, size.width, bias=False)
        self.branches = nn.ModuleList(nn.Linear(size.width, size.width, bias=False) for _ in range(size.depth))
        self.readout = nn.Linear(size.width, 1, bias=False)
        self.activation = FUNCTIONS[activation]

    def features(self, x: Tensor) -> Tensor:
        """What the readout gets, (P, width)."""
        h = self.stem(x)
        for branch in self.branches:
            h = h + branch(self.activation(h))
        return self.activation(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.features(x))[:, 0]


@dataclass(frozen=True)
class FiniteRun:
    outputs: np.ndarray  # (T + 1, P), less those at the start
    features: np.ndarray  # (P, P): the last features' kernel F F^T / N after the last step


def build_scaled_network(
    parameterization: ParameterizationConfig, size: Size, base: Size, inputs: int, seed: int, activation: ActivationName
) -> ScaledModel:
    network = ResidualNet(inputs, size, activation)
    return apply(parameterization, network, size=size, base=base, roles=ROLES, seed=seed)


def train_finite(
    parameterization: ParameterizationConfig,
    size: Size,
    base: Size,
    inputs: Tensor,
    targets: Tensor,
    optimizer: OptimizerConfig,
    steps: int,
    seed: int,
    activation: ActivationName = "relu",
) -> FiniteRun:
    """One network, trained on the mean of (f - f_0 - y)^2 / 2. inputs: (P, D); targets: (P,).

    The limit starts from f_0 = 0, a finite network from outputs of order N^-1/2, which would hide all else: they are
    added to the targets.
    """
    scaled = build_scaled_network(parameterization, size, base, inputs.shape[1], seed, activation)
    network = scaled.network
    assert isinstance(network, ResidualNet)
    algorithm = build_optimizer(parameter_groups(network, scaled.rules, scaled.scale, optimizer), optimizer)
    with torch.no_grad():
        start = network(inputs)
    outputs = []
    for step in range(steps + 1):
        outputs.append(network(inputs) - start)
        if step < steps:
            algorithm.zero_grad()
            (((outputs[-1] - targets) ** 2).mean() / 2).backward()
            algorithm.step()
    with torch.no_grad():
        features = network.features(inputs)
        kernel = features @ features.T / size.width
        return FiniteRun(torch.stack(outputs).double().numpy(), kernel.double().numpy())
