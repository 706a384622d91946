"""Monte Carlo training of an infinitely wide residual network that learns features: ReLU, tanh, erf or linear.

The equations are those of models.limit.linear with phi(h) in place of h where a kernel or a response is formed,

    h^(l+1)_t = h^l_t + sqrt(v) (u^l_t + sum_s A^l_ts g^(l+1)_s) + kappa r sum_s Phi^l_ts m_ts g^(l+1)_s
    g^l_t = g^(l+1)_t + phi'(h^l_t) z^l_t
    z^l_t = sqrt(v) (r^l_t + sum_s B^l_ts phi(h^l_s)) + kappa r sum_s G^(l+1)_ts m_ts phi(h^l_s)
    g^(L+1)_t = phi'(h^(L+1)_t) (w_0 + kappa sum_s m_ts phi(h^(L+1)_s)),   u^l ~ N(0, Phi^l),   r^l ~ N(0, G^(l+1)),

and averages <> over S sites (neurons of the limit) in place of exact ones. Responses need no second derivative: by
Novikov's theorem A^l = <phi(h^l) r^l> <r^l r^l>^-1 over earlier steps, and B^l = <g^(l+1) u^l> <u^l u^l>^-1 over
earlier steps and the present one, where phi'' makes it differ from 0 once a network is trained. Sites are marched
through time as in the linear solver, each new u and r drawn given its past. Cost S L (P T)^2.

Against noise, sites come in four copies with the signs of (h_in, u) and (w_0, r) turned, so that f_0 = 0 exactly, and
the new part of a source is made to have exactly its covariance over the sites.
"""

import math

import numpy as np

from depthmup.models.errors import ModelError
from depthmup.models.limit.activations import ACTIVATIONS
from depthmup.models.limit.kernels import refuse_unstable
from depthmup.models.limit.network import InfiniteNetwork, Training, Trajectory

SIGNS = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)])  # of a site's copies: (h_in and u), (w_0 and r)


def regress(fields: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(a, b): the coefficients of `fields` (sites, a) on Gaussian `sources` (sites, b), <f s> <s s>^-1.

    Steps that hardly differ make <source source> nearly singular. A ridge of its mean eigenvalue over the number of
    sites, which is the size of the noise in it, keeps that noise small.
    """
    sites, count = sources.shape
    if not count:
        return np.zeros((fields.shape[1], 0))
    covariance = sources.T @ sources / sites
    ridge = np.trace(covariance) / sites
    found: np.ndarray = np.linalg.solve(covariance + ridge * np.eye(count), sources.T @ fields / sites).T
    return found


def compute_root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root; what noise makes negative is 0."""
    values, vectors = np.linalg.eigh(covariance)
    found: np.ndarray = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return found


def draw(
    covariance: np.ndarray, past: np.ndarray, known: np.ndarray, signs: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The present values (sites, P) of a Gaussian source given its `past` (sites, b). covariance: (P, b + P), of the
    present with past and present. What is new is uncorrelated with past and `known` (sites, any) over the sites."""
    sites, samples = len(past), len(covariance)
    before, now = covariance[:, : past.shape[1]], covariance[:, past.shape[1] :]
    inverse = np.linalg.pinv(past.T @ past / sites, rcond=1e-10, hermitian=True) if past.size else np.zeros((0, 0))
    coefficients = before @ inverse
    noise = np.kron(rng.standard_normal((sites // len(SIGNS), samples)), np.ones((len(SIGNS), 1))) * signs[:, None]
    fixed = np.concatenate([past, known], axis=1)
    noise -= fixed @ (np.linalg.pinv(fixed.T @ fixed, rcond=1e-10, hermitian=True) @ (fixed.T @ noise))
    noise = noise @ np.linalg.pinv(compute_root(noise.T @ noise / sites), hermitian=True)
    return past @ coefficients.T + noise @ compute_root(now - coefficients @ before.T)


def train_rich(
    network: InfiniteNetwork, training: Training, sites: int = 4000, seed: int = 0, responses: bool = True
) -> Trajectory:
    """The network's trajectory from `sites` sites, a multiple of 4. Halve them to see how much they matter.
    `responses` False drops A and B, which is wrong. Raises ModelError for a rate past the edge of stability."""
    if sites % len(SIGNS) or sites < 4 * (training.steps + 1) * training.samples:
        raise ModelError(f"{sites} sites: use a multiple of 4, at least 4 times (steps + 1) times samples")
    refuse_unstable(network, training)
    activation, rng = ACTIVATIONS[network.activation], np.random.default_rng(seed)
    L, P, kappa, count = (
        network.depth,
        training.samples,
        training.rate * network.gamma,
        (training.steps + 1) * training.samples,
    )
    forward_signs, backward_signs = np.tile(SIGNS, (sites // len(SIGNS), 1)).T
    phi, g = (np.zeros((L + 1, sites, count)) for _ in range(2))
    u, r = (np.zeros((L, sites, count)) for _ in range(2))
    Phi, G = (np.zeros((L + 1, count, count)) for _ in range(2))
    nothing = np.zeros((sites, 0))
    h_in = draw(training.input_kernel, nothing, nothing, forward_signs, rng)
    w_0 = draw(np.ones((1, 1)), nothing, h_in, backward_signs, rng)
    inputs, root_v = np.tile(training.input_kernel, (1, training.steps + 1)), math.sqrt(network.branch_variance)
    memory = np.repeat(training.memory(), P, axis=1) / P  # (T + 1, n)
    outputs, errors = np.zeros((training.steps + 1, P)), np.zeros(count)

    def extend(kernel: np.ndarray, field: np.ndarray, now: slice) -> None:
        """Fills in the rows and columns of the present step."""
        new = field[:, now].T @ field[:, : now.stop] / sites
        kernel[now, : now.stop], kernel[: now.stop, now] = new, new.T

    for step in range(training.steps + 1):
        now, past, known = slice(step * P, (step + 1) * P), slice(0, step * P), slice(0, (step + 1) * P)
        weights = kappa * memory[step, past] * errors[past]  # kappa m_ts
        h = h_in + g[0, :, past] @ (network.input_rate * inputs[:, past] * weights).T
        slopes = []
        for layer in range(L):
            phi[layer, :, now] = activation.value(h)
            slopes.append(activation.slope(h))
            extend(Phi[layer], phi[layer], now)
            u[layer, :, now] = draw(Phi[layer, now, known], u[layer, :, past], h, forward_signs, rng)
            feedback = network.hidden_rate * Phi[layer, now, past] * weights
            if responses:
                feedback += root_v * regress(phi[layer, :, now], r[layer, :, past])
            h = h + root_v * u[layer, :, now] + g[layer + 1, :, past] @ feedback.T
        phi[L, :, now] = activation.value(h)
        extend(Phi[L], phi[L], now)
        readout = w_0 + (phi[L, :, past] @ weights)[:, None]
        outputs[step] = (readout * phi[L, :, now]).mean(axis=0) / network.gamma
        errors[now] = training.targets - outputs[step]
        g[L, :, now] = readout * activation.slope(h)
        extend(G[L], g[L], now)
        for layer in reversed(range(L)):
            r[layer, :, now] = draw(
                G[layer + 1, now, known], r[layer, :, past], g[layer + 1, :, now], backward_signs, rng
            )
            back = (
                root_v * r[layer, :, now]
                + phi[layer, :, past] @ (network.hidden_rate * G[layer + 1, now, past] * weights).T
            )
            if responses:
                back += root_v * phi[layer, :, known] @ regress(g[layer + 1, :, now], u[layer, :, known]).T
            g[layer, :, now] = g[layer + 1, :, now] + slopes[layer] * back
            extend(G[layer], g[layer], now)
    return Trajectory(outputs, Phi, G)
