"""From a curve's runs to the mean of each value, free of the seeds' offsets, and to the noise between seeds."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, polygamma

FREE = 1e4  # standard deviation of a seed's offset, in those of the noise


@dataclass(frozen=True)
class ValueEffects:
    """Least squares over a curve's runs: the mean log loss of each value, free of the seeds' offsets."""

    x: np.ndarray  # (values,)
    mean: np.ndarray  # (values,)
    covariance: np.ndarray  # (values, values), in units of the noise's variance
    residual: float  # sum of squares
    freedom: int  # of the residual


def estimate_effects(x: np.ndarray, y: np.ndarray) -> ValueEffects:
    """x: (values,); y: (seeds, values) log losses, NaN where there is no run.

    Values that no chain of seeds connects cannot be compared: the covariance says so, as offsets are not quite free.
    """
    y = y[np.isfinite(y).any(axis=1)]
    seeds, values = np.nonzero(np.isfinite(y))
    add_up_to_zero = np.linalg.svd(np.ones((1, len(y))))[2][1:].T  # offsets that do: (seeds, seeds - 1)
    rows, others = np.arange(len(seeds)), add_up_to_zero.shape[1]
    design = np.zeros((len(rows) + others, len(x) + others))
    design[rows, values] = 1.0
    design[: len(rows), len(x) :] = add_up_to_zero[seeds]
    design[len(rows) :, len(x) :] = np.eye(others) / FREE
    observed = np.append(y[seeds, values], np.zeros(others))
    solution = np.linalg.pinv(design)
    effects = solution @ observed
    residual = float(((observed - design @ effects)[: len(rows)] ** 2).sum())
    of_runs = solution[: len(x)]
    freedom = len(rows) - int(np.linalg.matrix_rank(design[: len(rows)]))
    return ValueEffects(x, effects[: len(x)], of_runs @ of_runs.T, residual, freedom)


def invert_trigamma(value: float) -> float:
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
    prior = min(2 * invert_trigamma(excess), total)
    return prior, math.exp(mean + float(digamma(prior / 2)) - math.log(prior / 2))
