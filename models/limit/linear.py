"""Exact training of a deep linear residual network of infinite width, at any depth.

All fields are linear in Gaussian sources: the first layer h_in ~ N(0, K^x), the readout w_0 ~ N(0, 1), and for every
layer u^l ~ N(0, H^l) (what W^l makes of h^l) and r^l ~ N(0, G^(l+1)) (what its transpose makes of g^(l+1)). A field is
kept as its row of coefficients on the sources. With t and s indices over (step, sample), kappa = rate gamma, weights
m_ts = memory_ts Delta_s / P (0 unless s is an earlier step),

    h^1_t     = h_in_t + kappa c sum_s K^x_ts m_ts g^1_s
    h^(l+1)_t = h^l_t + sqrt(v) u^l_t + sum_s (sqrt(v) A^l_ts + kappa r H^l_ts m_ts) g^(l+1)_s,   A^l = d h^l / d r^l
    g^(L+1)_t = w_0 + kappa sum_s m_ts h^(L+1)_s,   f_t = <g^(L+1)_t h^(L+1)_t> / gamma
    g^l_t     = g^(l+1)_t + sqrt(v) r^l_t + sum_s (sqrt(v) B^l_ts + kappa r G^(l+1)_ts m_ts) h^l_s

with B^l = d g^(l+1) / d u^l (2309.16620, appendix on the limit; 2205.09653 for the responses A and B). Only earlier
steps stand on the right: marching through time, up the layers and down again, is exact, and nothing is iterated to a
fixed point.
"""

import math

import numpy as np

from depthmup.models.errors import ModelError
from depthmup.models.limit.kernels import refuse_unstable
from depthmup.models.limit.network import InfiniteNetwork, Training, Trajectory


class Sources:
    """The columns of a field's row: h_in (P), w_0 (1), u (L, n), r (L, n); and the covariances of u and r as they
    become known, H and G of shape (L + 1, n, n)."""

    def __init__(self, depth: int, input_kernel: np.ndarray, count: int) -> None:
        self.depth, self.count, self.input_kernel = depth, count, input_kernel
        self.samples = len(input_kernel)
        self.start = self.samples + 1
        self.size = self.start + 2 * depth * count
        self.forward = np.zeros((depth + 1, count, count))
        self.backward = np.zeros((depth + 1, count, count))

    def u(self, layer: int) -> slice:
        first = self.start + layer * self.count
        return slice(first, first + self.count)

    def r(self, layer: int) -> slice:
        return self.u(self.depth + layer)

    def covariance(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """<a b> of fields with coefficients rows (a, size), others (b, size): (a, b)."""
        samples, start, half = self.samples, self.start, self.depth * self.count
        blocks = (
            rows[:, :samples] @ self.input_kernel,
            rows[:, samples:start],
            self.spread(rows[:, start : start + half], self.forward[:-1]),
            self.spread(rows[:, start + half :], self.backward[1:]),
        )
        return np.concatenate(blocks, axis=1) @ others.T

    def spread(self, rows: np.ndarray, covariances: np.ndarray) -> np.ndarray:
        by_layer = rows.reshape(len(rows), self.depth, self.count).transpose(1, 0, 2)
        return (by_layer @ covariances).transpose(1, 0, 2).reshape(len(rows), -1)


def train_linear(network: InfiniteNetwork, training: Training, responses: bool = True) -> Trajectory:
    """The network's trajectory. `responses` False drops A and B, which is wrong by a term of order 1 at every depth.

    Raises ModelError for another activation, or a rate past the edge of stability.
    """
    if network.activation != "linear":
        raise ModelError(f"the exact solver is of linear networks, not of {network.activation}: use train_rich")
    refuse_unstable(network, training)
    L, P, kappa = network.depth, training.samples, training.rate * network.gamma
    count = (training.steps + 1) * P
    sources = Sources(L, training.input_kernel, count)
    H, G = sources.forward, sources.backward
    h, g = (np.zeros((L + 1, count, sources.size)) for _ in range(2))
    inputs, root_v = np.tile(training.input_kernel, (1, training.steps + 1)), math.sqrt(network.branch_variance)
    memory = np.repeat(training.memory(), P, axis=1) / P  # (T + 1, n)
    outputs, errors = np.zeros((training.steps + 1, P)), np.zeros(count)

    def extend(covariance: np.ndarray, field: np.ndarray, now: slice) -> None:
        """Fills in the rows and columns of the present step."""
        new = sources.covariance(field[now], field[: now.stop])
        covariance[now, : now.stop], covariance[: now.stop, now] = new, new.T

    for step in range(training.steps + 1):
        now, past = slice(step * P, (step + 1) * P), slice(0, step * P)
        weights = kappa * memory[step, past] * errors[past]  # kappa m_ts
        own = np.arange(now.start, now.stop)
        h[0, now, :P] = np.eye(P)
        h[0, now] += network.input_rate * (inputs[:, past] * weights) @ g[0, past]
        extend(H[0], h[0], now)
        for layer in range(L):
            feedback = network.hidden_rate * H[layer, now, past] * weights
            if responses:
                feedback += root_v * h[layer, now, sources.r(layer)][:, past]
            h[layer + 1, now] = h[layer, now] + feedback @ g[layer + 1, past]
            h[layer + 1, own, sources.u(layer).start + own] += root_v
            extend(H[layer + 1], h[layer + 1], now)
        g[L, now, P] = 1.0
        g[L, now] += weights @ h[L, past]
        outputs[step] = np.diag(sources.covariance(g[L, now], h[L, now])) / network.gamma
        errors[now] = training.targets - outputs[step]
        extend(G[L], g[L], now)
        for layer in reversed(range(L)):
            feedback = network.hidden_rate * G[layer + 1, now, past] * weights
            if responses:
                feedback += root_v * g[layer + 1, now, sources.u(layer)][:, past]
            g[layer, now] = g[layer + 1, now] + feedback @ h[layer, past]
            g[layer, own, sources.r(layer).start + own] += root_v
            extend(G[layer], g[layer], now)
    return Trajectory(outputs, H, G)
