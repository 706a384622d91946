"""The infinitely wide network that every solver here is about, and its training, reduced to what the limit depends on.

    h^1 = W^0 x / sqrt(D),   h^(l+1) = h^l + sqrt(v / N) W^l phi(h^l),   f = w . phi(h^(L+1)) / (gamma N)

with entries N(0, 1), N -> infinity, under full-batch gradient descent on the mean of (f - y)^2 / 2 (2309.16620, eq. 1
and 2). In the paper's form v = r = beta^2 / L, and the input is trained at c = 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from depthmup.models.errors import ModelError

ActivationName = Literal["relu", "linear", "erf", "tanh"]
SAME = 1e-9  # inputs whose cosine is nearer to 1 are the same


@dataclass(frozen=True)
class InfiniteNetwork:
    """`branch_variance` v, `hidden_rate` r and `input_rate` c: how much of a step's feedback goes through one branch,
    and through the input layer, in units of the readout's. All without unit."""

    activation: ActivationName
    depth: int
    branch_variance: float
    hidden_rate: float
    input_rate: float
    gamma: float

    def __post_init__(self) -> None:
        if self.gamma <= 0 or not math.isfinite(self.gamma):
            raise ModelError(f"gamma0 is {self.gamma:g}, but must be above 0: it divides the output (1 is usual)")
        if self.depth < 1 or min(self.branch_variance, self.hidden_rate, self.input_rate) < 0:
            raise ModelError("the limit needs a depth of at least 1, and no negative variance or rate")


def build_paper_network(
    activation: ActivationName, depth: int, beta: float = 1.0, gamma0: float = 1.0, input_rate: float = 1.0
) -> InfiniteNetwork:
    """The absolute form of 2309.16620: branches beta / sqrt(L). `input_rate` 0 freezes the input layer."""
    return InfiniteNetwork(activation, depth, beta**2 / depth, beta**2 / depth, input_rate, gamma0)


@dataclass(frozen=True)
class Training:
    """Full-batch gradient descent. `input_kernel` is X X^T / D, (P, P); `targets` (P,); `rate` is eta0, the learning
    rate over gamma^2 N in the paper's form. Raises ModelError for inputs that repeat."""

    input_kernel: np.ndarray
    targets: np.ndarray
    rate: float
    steps: int
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.input_kernel.shape != (self.samples, self.samples):
            raise ModelError(f"{self.samples} targets beside an input kernel of shape {self.input_kernel.shape}")
        refuse_repeated(self.input_kernel)

    @property
    def samples(self) -> int:
        return len(self.targets)

    def memory(self) -> np.ndarray:
        """(steps + 1, steps + 1): weights move by -rate * sum_s memory[t, s] gradient_s up to step t; 0 unless s < t.
        Heavy ball repeats a gradient: 1 + momentum + ... + momentum^(t - s - 1)."""
        age = np.subtract.outer(np.arange(self.steps + 1), np.arange(self.steps + 1))
        sums = np.cumsum(self.momentum ** np.arange(self.steps + 1.0))
        return np.where(age > 0, sums[np.maximum(age - 1, 0)], 0.0)


@dataclass(frozen=True)
class Trajectory:
    """What a network does at steps 0 ... T. Field indices run over (step, sample), samples fastest: n = (T + 1) P."""

    outputs: np.ndarray  # (T + 1, P)
    forward: np.ndarray  # (L + 1, n, n): <phi(h^l) phi(h^l)>, the feature kernels of all layers and times
    backward: np.ndarray  # (L + 1, n, n): <g^l g^l>, g = gamma N df/dh

    def loss(self, targets: np.ndarray) -> np.ndarray:
        """(T + 1,): mean over samples of (f - y)^2 / 2."""
        return ((self.outputs - targets) ** 2).mean(axis=1) / 2


def refuse_repeated(input_kernel: np.ndarray) -> None:
    """Raises ModelError for an input of norm 0, or two that have the same direction: their kernel is singular."""
    norms = np.sqrt(np.diag(input_kernel))
    if not np.isfinite(input_kernel).all() or not (norms > 0).all():
        raise ModelError("an input is zero or not finite: the limit's kernels need the direction of every input")
    cosine = np.tril(input_kernel / np.outer(norms, norms), -1)
    first, second = np.unravel_index(int(cosine.argmax()), cosine.shape)
    if cosine[first, second] > 1 - SAME:
        raise ModelError(f"inputs {second} and {first} are the same, and the kernel is singular: leave one out")


def extrapolate_depth(values: Mapping[float, np.ndarray], degree: int) -> np.ndarray:
    """The limit of values at several depths, all of one shape: least squares of a polynomial in 1 / depth."""
    depths = np.array(sorted(values), dtype=float)
    rows = np.array([np.ravel(values[depth]) for depth in depths])
    powers = np.vander(1 / depths, degree + 1, increasing=True)
    found: np.ndarray = np.linalg.lstsq(powers, rows, rcond=None)[0][0]
    return found.reshape(np.shape(values[depths[0]]))
