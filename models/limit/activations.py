"""Activations, and the two averages over a Gaussian pair that kernels need.

    Phi = <phi(u) phi(v)>,  Phidot = <phi'(u) phi'(v)>,  (u, v) Gaussian with variances q1, q2 and correlation rho

ReLU and erf in closed form (Cho and Saul 2009; Williams 1997), tanh by its Hermite series (Mehler's formula):
Phi = sum_k a_k(q1) a_k(q2) rho^k, where a_k(q) = <phi(sqrt(q) z) He_k(z)> / sqrt(k!), a quadrature in z.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import erf, roots_hermitenorm

Function = Callable[[np.ndarray], np.ndarray]
# (rho of each pair (pairs,), q (P,), first and second sample of each pair (pairs,)) -> (Phi, Phidot), (pairs,) each
Averages = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

TERMS, NODES = (
    160,
    256,
)  # of the series, of the quadrature. Errors are largest at rho = 1: 2e-9 at q = 4, 1e-5 at q = 16
TINY = 1e-12  # what a term may add and be left out


@dataclass(frozen=True)
class Activation:
    value: Function
    slope: Function
    averages: Averages


def relu_averages(
    rho: np.ndarray, q: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    norm, supplement = np.sqrt(q[first] * q[second]), np.pi - np.arccos(rho)
    # sin t + (pi - t) cos t
    return norm * (np.sqrt(1 - rho**2) + supplement * rho) / (2 * np.pi), supplement / (2 * np.pi)


def linear_averages(
    rho: np.ndarray, q: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return np.sqrt(q[first] * q[second]) * rho, np.ones_like(rho)


@cache
def hermite_basis() -> tuple[np.ndarray, np.ndarray]:
    """(nodes (NODES,), He_k / sqrt(k!) times the weights of N(0, 1) (TERMS, NODES))."""
    nodes, weights = roots_hermitenorm(NODES)
    basis = [np.ones(NODES), nodes]
    for k in range(1, TERMS - 1):  # sqrt(k + 1) e_(k+1) = z e_k - sqrt(k) e_(k-1)
        basis.append((nodes * basis[k] - math.sqrt(k) * basis[k - 1]) / math.sqrt(k + 1))
    return nodes, np.array(basis) * weights / weights.sum()


def tanh_slope(x: np.ndarray) -> np.ndarray:
    return 1 - np.tanh(x) ** 2


def tanh_averages(
    rho: np.ndarray, q: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    nodes, basis = hermite_basis()
    arguments = np.sqrt(q)[:, None] * nodes

    def series(values: np.ndarray, parity: int) -> np.ndarray:
        """The terms k of one parity, the others being 0, by Horner's rule in rho^2, from the last that is not tiny."""
        coefficients = (values @ basis.T)[:, parity::2].T  # a_k(q): (terms, P)
        kept = np.flatnonzero((coefficients**2).max(axis=1) > TINY)
        total, square = np.zeros_like(rho), rho**2
        for a in coefficients[kept[-1] :: -1]:
            total = total * square + a[first] * a[second]
        return total * rho if parity else total

    return series(np.tanh(arguments), 1), series(tanh_slope(arguments), 0)


def erf_slope(x: np.ndarray) -> np.ndarray:
    return 2 / math.sqrt(math.pi) * np.exp(-(x**2))


def erf_averages(
    rho: np.ndarray, q: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    k, scale = rho * np.sqrt(q[first] * q[second]), (1 + 2 * q[first]) * (1 + 2 * q[second])
    return 2 / np.pi * np.arcsin(2 * k / np.sqrt(scale)), 4 / np.pi / np.sqrt(scale - 4 * k**2)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(lambda x: np.maximum(x, 0.0), lambda x: (x > 0).astype(x.dtype), relu_averages),
    "linear": Activation(lambda x: x, np.ones_like, linear_averages),
    "erf": Activation(erf, erf_slope, erf_averages),
    "tanh": Activation(np.tanh, tanh_slope, tanh_averages),
}
