"""From a curve's runs to the mean of each value, free of the seeds' offsets, and to the noise between seeds."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, polygamma


@dataclass(frozen=True)
class ValueEffects:
    """Least squares over a curve's runs: the mean log loss of each value, free of the seeds' offsets."""

    x: np.ndarray  # (values,)
    mean: np.ndarray  # (values,)
    covariance: np.ndarray  # (values, values), in units of the noise's variance
    residual: float  # sum of squares
    freedom: int  # of the residual


def value_effects(x: np.ndarray, y: np.ndarray) -> ValueEffects:
    """x: (values,); y: (seeds, values) log losses, NaN where there is no run."""
    y = y[np.isfinite(y).any(axis=1)]
    seeds, values = np.nonzero(np.isfinite(y))
    design = np.zeros((len(seeds) + 1, len(x) + len(y)))
    rows = np.arange(len(seeds))
    design[rows, values] = design[rows, len(x) + seeds] = 1.0
    design[-1, len(x) :] = 1.0  # the seeds' offsets add up to 0: a row that carries no noise
    middle = y[seeds, values].mean()  # so that seeds without a value in common differ by their means, and no more
    observed = np.append(y[seeds, values] - middle, 0.0)
    solution = np.linalg.pinv(design)
    effects = solution @ observed
    residual = float(((observed - design @ effects) ** 2).sum())
    of_runs = solution[: len(x), :-1]
    freedom = len(observed) - int(np.linalg.matrix_rank(design))
    return ValueEffects(x, effects[: len(x)] + middle, of_runs @ of_runs.T, residual, freedom)


def inverse_trigamma(value: float) -> float:
    """x with trigamma(x) = value: Newton's method on 1 / trigamma, which is nearly linear (Smyth 2004, appendix)."""
    x = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1 - trigamma / value) / float(polygamma(2, x))
        x += step
        if -step < 1e-8 * x:
            break
    return x


def estimate_prior(variances: np.ndarray, freedoms: np.ndarray) -> tuple[float, float]:
    """(degrees of freedom, variance) of the prior towards which variances of a study's curves are moderated, by the
    moments of log variances (Smyth 2004, section 6.2); all their freedom, and their mean, where they scatter no more
    than estimates of one variance do.
    """
    half = freedoms / 2
    logs = np.log(variances) - digamma(half) + np.log(half)
    mean = float(np.average(logs, weights=freedoms))
    if len(logs) < 2:
        return 0.0, math.exp(mean)
    excess = float(logs.var(ddof=1) - polygamma(1, half).mean())
    total = float(freedoms.sum())
    if excess <= 0:
        return total, float(np.average(variances, weights=freedoms))
    prior = min(2 * inverse_trigamma(excess), total)
    return prior, math.exp(mean + float(digamma(prior / 2)) - math.log(prior / 2))
