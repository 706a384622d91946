"""The lazy limit (gamma -> 0): kernels that do not move, at a finite depth and at infinite depth.

2309.16620, proposition 2, for any activation. With v the variance of one branch, r its rate, and c the input's,

    H^(l+1) = H^l + v Phi(H^l),                        H^1 = K^x
    G^l     = G^(l+1) (1 + v Phidot(H^l)),             G^(L+1) = Phidot(H^(L+1))
    NTK     = Phi(H^(L+1)) + r sum_l G^(l+1) Phi(H^l) + c G^1 K^x

(entry by entry) and, with v = s / L and r = rho / L, as L -> infinity in tau = l / L

    H' = s Phi(H),   G' = -s G Phidot(H),   NTK = Phi(1) + rho int G Phi dtau + c G(0) K^x.
"""

import math
from dataclasses import dataclass

import numpy as np

from depthmup.models.errors import ModelError
from depthmup.models.limit.activations import ACTIVATIONS
from depthmup.models.limit.network import ActivationName, InfiniteNetwork, Training

LEAST_STEPS = 12  # of the ODE's solver, of fourth order: relative errors of 2e-7 at s = 1


@dataclass(frozen=True)
class TangentKernel:
    """What f gains by a unit of rate on the readout, in the branches and on the input layer: (P, P) each."""

    readout: np.ndarray
    hidden: np.ndarray
    input: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.readout + self.hidden + self.input


class Pairs:
    """The pairs i <= j of P samples. Kernels are arrays (P (P + 1) / 2,) over them: half the work of a matrix."""

    def __init__(self, activation: ActivationName, samples: int) -> None:
        self.averages = ACTIVATIONS[activation].averages
        self.first, self.second = np.triu_indices(samples)
        self.diagonal = np.flatnonzero(self.first == self.second)

    def __call__(self, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Phi, Phidot) of a pre-activation kernel."""
        norms = kernel[self.diagonal]
        cosine = np.clip(kernel / np.sqrt(norms[self.first] * norms[self.second]), -1.0, 1.0)
        return self.averages(cosine, norms, self.first, self.second)

    def pack(self, kernel: np.ndarray) -> np.ndarray:
        return kernel[self.first, self.second]

    def unpack(self, kernel: np.ndarray) -> np.ndarray:
        samples = len(self.diagonal)
        full = np.empty((samples, samples))
        full[self.first, self.second] = full[self.second, self.first] = kernel
        return full


def compute_finite_depth_kernel(network: InfiniteNetwork, input_kernel: np.ndarray) -> TangentKernel:
    """The tangent kernel at the start of an infinitely wide network of this depth. input_kernel: (P, P)."""
    pairs = Pairs(network.activation, len(input_kernel))
    inputs = h = pairs.pack(input_kernel)
    layers = []
    for _ in range(network.depth):
        phi, slope = pairs(h)
        layers.append((phi, slope))
        h = h + network.branch_variance * phi
    readout, g = pairs(h)
    hidden = np.zeros_like(h)
    for phi, slope in reversed(layers):
        hidden += network.hidden_rate * g * phi
        g = g * (1 + network.branch_variance * slope)
    return TangentKernel(*map(pairs.unpack, (readout, hidden, network.input_rate * g * inputs)))


def compute_infinite_depth_kernel(
    activation: ActivationName, input_kernel: np.ndarray, s: float = 1.0, rho: float | None = None, c: float = 1.0
) -> TangentKernel:
    """The same at infinite depth. s: L times a branch's variance, beta^2 in the paper's form; rho: L times its rate, s
    where it is None; c: the input's rate.

    With E(tau) = s int_0^tau Phidot, G(tau) = Phidot(1) exp(E(1) - E(tau)): all is integrated forwards, by Runge-Kutta.
    """
    rho = s if rho is None else rho
    pairs = Pairs(activation, len(input_kernel))
    inputs = pairs.pack(input_kernel)
    state = np.array([inputs, np.zeros_like(inputs), np.zeros_like(inputs)])  # H, E, int exp(-E) Phi

    def slope(state: np.ndarray) -> np.ndarray:
        phi, phidot = pairs(state[0])
        return np.array([s * phi, s * phidot, np.exp(-state[1]) * phi])

    steps = max(LEAST_STEPS, math.ceil(8 * s))
    step = 1 / steps
    for _ in range(steps):
        one = slope(state)
        two = slope(state + step / 2 * one)
        three = slope(state + step / 2 * two)
        four = slope(state + step * three)
        state = state + step / 6 * (one + 2 * two + 2 * three + four)
    h, exponent, integral = state
    phi, phidot = pairs(h)
    g0 = phidot * np.exp(exponent)
    return TangentKernel(*map(pairs.unpack, (phi, rho * g0 * integral, c * g0 * inputs)))


def find_largest_rate(kernel: np.ndarray, momentum: float = 0.0) -> float:
    """The edge of stability at the start: the largest stable rate for the mean over P samples of (f - y)^2 / 2,
    2 (1 + momentum) / lambda_max(NTK / P). kernel: (P, P)."""
    return 2 * (1 + momentum) * len(kernel) / float(np.linalg.eigvalsh(kernel)[-1])


def refuse_unstable(network: InfiniteNetwork, training: Training) -> None:
    """Raises ModelError for a rate at which training diverges from the start."""
    edge = find_largest_rate(compute_finite_depth_kernel(network, training.input_kernel).total, training.momentum)
    if training.rate >= edge:
        raise ModelError(
            f"the rate {training.rate:.3g} is past the edge of stability, 2 (1 + momentum) / lambda_max = {edge:.3g}: "
            "the infinite network diverges; choose a rate below it"
        )
