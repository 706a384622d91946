"""Activations, and the two averages over a Gaussian pair that kernels need.

    Phi = <phi(u) phi(v)>,  Phidot = <phi'(u) phi'(v)>,  (u, v) Gaussian with variances q1, q2 and correlation rho

ReLU and erf in closed form (Cho and Saul 2009; Williams 1997), tanh by its Hermite series (Mehler's formula):
Phi = sum_k a_k(q1) a_k(q2) rho^k, where a_k(q) = <phi(sqrt(q) z) He_k(z)> / sqrt(k!), a quadrature in z.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from scipy.special import erf, roots_hermitenorm

Function = Callable[[np.ndarray], np.ndarray]
# (rho of each pair (pairs,), q (P,), first and second sample of each pair (pairs,)) -> (Phi, Phidot), (pairs,) each
Averages = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

# Of the series, of the quadrature. Errors are largest at rho = 1: 2e-9 at q = 4, 1e-5 at q = 16.
TERMS, NODES = 160, 256
TINY = 1e-10  # what a term may add and be left out
BANDS = (-1.0, 0.05, 0.2, 0.5, 0.8, 1.0)  # of rho^2
BLOCK = 32768  # pairs


@dataclass(frozen=True)
class Activation:
    value: Function
    slope: Function
    averages: Averages


def average_relu(
    rho: np.ndarray, q: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    norm, supplement = np.sqrt(q[first] * q[second]), np.pi - np.arccos(rho)
    # sin t + (pi - t) cos t
    return norm * (np.sqrt(1 - rho**2) + supplement * rho) / (2 * np.pi), supplement / (2 * np.pi)


def average_linear(
    rho: np.ndarray, q: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return np.sqrt(q[first] * q[second]) * rho, np.ones_like(rho)


@cache
def build_hermite_basis() -> tuple[np.ndarray, np.ndarray]:
    """(nodes (NODES,), He_k / sqrt(k!) times the weights of N(0, 1) (TERMS, NODES))."""
    nodes, weights = roots_hermitenorm(NODES)
    basis = [np.ones(NODES), nodes]
    for k in range(1, TERMS - 1):  # sqrt(k + 1) e_(k+1) = z e_k - sqrt(k) e_(k-1)
        basis.append((nodes * basis[k] - math.sqrt(k) * basis[k - 1]) / math.sqrt(k + 1))
    return nodes, np.array(basis) * weights / weights.sum()


def tanh_slope(x: np.ndarray) -> np.ndarray:
    return 1 - np.tanh(x) ** 2


def average_tanh(
    rho: np.ndarray, q: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """With S = sum_m a_(2m+1)(q1) a_(2m+1)(q2) x^m and x = rho^2: Phi = rho S, and as Phidot is Phi's slope along the
    covariance, (S + 2 x S') / sqrt(q1 q2). S and S' by Horner's rule: few terms where x is small, and blocks that stay
    in the processor's cache."""
    nodes, basis = build_hermite_basis()
    odd = (np.tanh(np.sqrt(q)[:, None] * nodes) @ basis.T)[:, 1::2].T  # (terms, P); the others are 0
    m, squares = np.arange(len(odd)), rho**2
    weights = (2 * m + 1) * (odd**2).max(axis=1)  # of x^m in Phidot, at most
    phi, phidot = np.full_like(rho, np.nan), np.full_like(rho, np.nan)
    for low, high in pairwise(BANDS):
        band = np.flatnonzero((squares > low) & (squares <= high))
        kept = odd[: np.flatnonzero(weights * high**m > TINY)[-1] + 1]
        for start in range(0, len(band), BLOCK):
            block = band[start : start + BLOCK]
            i, j, x = first[block], second[block], squares[block]
            total, slope, one, other = (np.zeros_like(x) for _ in range(4))
            for a in kept[::-1]:
                slope *= x
                slope += total
                total *= x
                np.take(a, i, out=one, mode="clip")  # twice as fast as a[i]; no index is out of bounds
                one *= np.take(a, j, out=other, mode="clip")
                total += one
            phi[block] = rho[block] * total
            phidot[block] = (total + 2 * x * slope) / np.sqrt(q[i] * q[j])
    return phi, phidot


def erf_slope(x: np.ndarray) -> np.ndarray:
    return 2 / math.sqrt(math.pi) * np.exp(-(x**2))


def average_erf(rho: np.ndarray, q: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    k, scale = rho * np.sqrt(q[first] * q[second]), (1 + 2 * q[first]) * (1 + 2 * q[second])
    return 2 / np.pi * np.arcsin(2 * k / np.sqrt(scale)), 4 / np.pi / np.sqrt(scale - 4 * k**2)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(lambda x: np.maximum(x, 0.0), lambda x: (x > 0).astype(x.dtype), average_relu),
    "linear": Activation(lambda x: x, np.ones_like, average_linear),
    "erf": Activation(erf, erf_slope, average_erf),
    "tanh": Activation(np.tanh, tanh_slope, average_tanh),
}
