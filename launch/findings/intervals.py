"""Intervals from draws: how sure every interval of the product is, and its bounds."""

import math

import numpy as np

CONFIDENCE = 0.9


def compute_quantile(draws: np.ndarray, share: float) -> float:
    """Infinite where it lies among infinite draws, between which numpy finds no number."""
    with np.errstate(invalid="ignore"):
        found = float(np.quantile(draws, share))
    return math.inf if math.isnan(found) else found


def compute_interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle CONFIDENCE of `draws`."""
    return compute_quantile(draws, (1 - CONFIDENCE) / 2), compute_quantile(draws, (1 + CONFIDENCE) / 2)


def bound_regret(optima: np.ndarray, regrets: np.ndarray, x: float) -> tuple[float, float]:
    """Of the log of the loss at `x` over the lowest, from its draws. Its lower end is 0 where the optimum's interval
    holds x."""
    low, high = compute_interval(optima)
    if low <= x <= high:
        return 0.0, compute_quantile(regrets, CONFIDENCE)
    return compute_interval(regrets)
