"""What the lazy limit predicts of a study: the largest stable rate, and how far it moves with size.

The largest stable rate goes as 1 / NTK. The rules (models.parameterization) give the NTK's terms their weights, so that
the prediction is for any preset, beta, gamma0 and base size. For one input of norm 1, ReLU and s = beta^2 L0 under
depth_mup, NTK(L) is proportional to (1 + s / 2L)^L + (s / 4) (1 + s / 2L)^(L - 1) (2309.16620, proposition 2).
"""

import math

import numpy as np

from depthmup.models.config import Size
from depthmup.models.errors import ModelError
from depthmup.models.limit.kernels import compute_finite_depth_kernel, compute_infinite_depth_kernel
from depthmup.models.limit.network import ActivationName, InfiniteNetwork
from depthmup.models.parameterization import Parameterization, Role, Scale

ONE_INPUT = np.ones((1, 1))


def build_network_under_rules(
    parameterization: Parameterization, size: Size, base: Size, inputs: int, activation: ActivationName = "relu"
) -> tuple[InfiniteNetwork, float]:
    """(the network, eta0 over the base's learning rate) of a residual network of this package with one layer a branch:
    `inputs` entries in an input, fan-in normal init with gain 1 in every layer, SGD.

    With m the readout's multiplier, sigma^2 the variance of its weights, b the branch multiplier and e_role the role's
    learning rate factor, a unit of rate gives f, as terms of the NTK,
        readout e m^2 N Phi,   branch e b^2 (N Phi) (N m^2 sigma^2 G),   input e (inputs K^x) (N m^2 sigma^2 G).
    At the base under any preset that is N0 Phi + beta^2 N0 Phi G + inputs K^x G.
    """
    scale = Scale(parameterization, size.width / base.width, size.depth / base.depth)
    N, b, m = size.width, scale.branch_multiplier(), scale.readout_multiplier()
    variance = scale.init_variance(Role.READOUT) / base.width
    backward = N * m**2 * variance  # of df/dh, over G
    rate = {role: scale.factors(role, "sgd").lr for role in (Role.READOUT, Role.BRANCH_HIDDEN, Role.INPUT)}
    readout = rate[Role.READOUT] * m**2 * N
    network = InfiniteNetwork(
        activation,
        size.depth,
        branch_variance=b**2 * scale.init_variance(Role.BRANCH_HIDDEN) * N / base.width,
        hidden_rate=rate[Role.BRANCH_HIDDEN] * b**2 * N * backward / readout,
        input_rate=rate[Role.INPUT] * inputs * backward / readout,
        gamma=1 / (m * math.sqrt(variance) * N),
    )
    return network, readout


def has_limit(parameterization: Parameterization) -> bool:
    """Whether kernels converge as width and depth grow: branches of total variance that stays finite."""
    return parameterization.width_rules and parameterization.depth_rules and parameterization.alpha >= 0.5


def compute_kernel_at(
    parameterization: Parameterization,
    size: Size,
    base: Size,
    inputs: int,
    input_kernel: np.ndarray = ONE_INPUT,
    activation: ActivationName = "relu",
) -> np.ndarray:
    """(P, P): the tangent kernel at the start for a unit of the base's learning rate, free of the noise of a width."""
    network, unit = build_network_under_rules(parameterization, size, base, inputs, activation)
    return unit * compute_finite_depth_kernel(network, input_kernel).total


def compute_kernel_in_limit(
    parameterization: Parameterization,
    base: Size,
    inputs: int,
    input_kernel: np.ndarray = ONE_INPUT,
    activation: ActivationName = "relu",
) -> np.ndarray:
    """(P, P): the same at infinite depth. Raises ModelError where there is no limit."""
    if not has_limit(parameterization):
        raise ModelError(
            f"{parameterization.name} with alpha {parameterization.alpha:g} has no limit: it needs width and depth "
            "rules and an alpha of at least 1/2, as depth_mup and completep"
        )
    network, unit = build_network_under_rules(parameterization, base, base, inputs, activation)
    s = base.depth * network.branch_variance if parameterization.alpha == 0.5 else 0.0
    rho = base.depth * network.hidden_rate
    return unit * compute_infinite_depth_kernel(activation, input_kernel, s, rho, network.input_rate).total


def predict_drift(
    parameterization: Parameterization, base: Size, size: Size | None, activation: ActivationName = "relu"
) -> float:
    """Octaves by which the largest stable rate of `size`, or of the limit where it is None, lies above the base's. The
    input layer counts as in the paper's form, where its rate is the readout's. Raises ModelError for no limit."""
    inputs = base.width
    at_base = compute_kernel_at(parameterization, base, base, inputs, activation=activation)
    if size is None:
        at_size = compute_kernel_in_limit(parameterization, base, inputs, activation=activation)
    else:
        at_size = compute_kernel_at(parameterization, size, base, inputs, activation=activation)
    return float(np.log2(at_base / at_size)[0, 0])
