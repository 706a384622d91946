"""Where the optimum of a search lies by its surrogate, a Gaussian process, and how sure each hyperparameter's part is.

The process is scikit-learn's, on the unit cube of the space: a Matern kernel with a length of its own for each
hyperparameter, and noise, all by maximum likelihood. Functions drawn from its posterior have their lowest values where
the optimum may lie. They are drawn on Sobol points, TURNS times, after the first also closer about where the lowest
values were before.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from depthmup.launch.findings.intervals import compute_interval

if TYPE_CHECKING:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Kernel

LEAST_MEASURED = 4  # losses, below which nothing is fitted
MOST_FITTED = 256  # losses: the time grows with their cube
POINTS, DRAWS, TURNS = 512, 256, 4
IMPUTATIONS = 3
JITTER = 1e-7  # of the process's variance: what rounding may make negative


@dataclass(frozen=True)
class Located:
    """The optimum on one dimension. best: of a range from 0 to 1, of a choice its number; interval: of a range; shares:
    of the draws, that have their optimum at each choice, empty for a range."""

    best: float
    interval: tuple[float, float]
    shares: tuple[float, ...]

    def list_likely(self, share: float) -> list[int]:
        """The fewest choices that hold the optimum of `share` of the draws, in their own order."""
        order = np.argsort(self.shares)[::-1]
        count = int(np.searchsorted(np.cumsum(np.array(self.shares)[order]), share - 1e-9)) + 1
        return sorted(order[:count].tolist())


def encode(points: np.ndarray, choices: Sequence[int]) -> np.ndarray:
    """A choice in as many columns as it has values, of which one is 1. points, choices: as `locate_optimum`."""
    columns = [
        np.eye(count)[column.astype(int)] if count else column[:, None]
        for column, count in zip(points.T, choices, strict=True)
    ]
    return np.concatenate(columns, axis=1)


def spread_points(choices: Sequence[int]) -> np.ndarray:
    """A fixed Sobol set. (POINTS, dimensions)"""
    from scipy.stats import qmc  # slow to import

    unit = qmc.Sobol(len(choices), seed=0).random(POINTS)
    return np.where(np.array(choices) > 0, np.floor(unit * np.array(choices)), unit)


def surround_points(centres: np.ndarray, width: float, choices: Sequence[int]) -> np.ndarray:
    """A fixed Sobol set about `centres` (n, dimensions), up to `width` to either side, where the space goes on, so that
    many lie on its edges. Of a choice half keep the value of their centre. (POINTS, dimensions)"""
    from scipy.stats import qmc

    step = 2 * qmc.Sobol(len(choices), seed=0).random(POINTS) - 1
    centre = np.resize(centres, step.shape)
    chosen = np.where(step < 0, centre, np.floor(step * np.array(choices)))
    return np.where(np.array(choices) > 0, chosen, np.clip(centre + width * step, 0, 1))


def select_fitted(losses: np.ndarray) -> np.ndarray:
    """Of more than MOST_FITTED the best half of that number, and as many spread over the ranks of the others."""
    order = np.argsort(losses, kind="stable")
    if len(order) <= MOST_FITTED:
        return order
    best, others = np.split(order, [MOST_FITTED // 2])
    return np.concatenate([best, others[np.linspace(0, len(others) - 1, MOST_FITTED // 2).astype(int)]])


def fit_process(
    kernel: "Kernel", points: np.ndarray, values: np.ndarray, tuned: bool = True
) -> "GaussianProcessRegressor":
    """`tuned`: with the kernel's parameters of the highest likelihood, found from those that it has."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor

    process = GaussianProcessRegressor(kernel, optimizer="fmin_l_bfgs_b" if tuned else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound, as of what does not matter
        return process.fit(points, values)


class Surrogate:
    """A Gaussian process of the logs of `losses` at `points` (n, columns). An infinite loss, as of a run that diverged
    or ended early, is no measurement: it is at least the median of the others, and is put at the mean of what the
    process expects above that (Hutter, Hoos and Leyton-Brown, arXiv 1310.1947)."""

    def __init__(self, points: np.ndarray, losses: np.ndarray) -> None:
        from scipy import stats
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        measured = np.isfinite(losses)
        logs = np.log(losses[measured])
        values = np.full(len(losses), np.median(logs))
        values[measured] = logs
        values = (values - logs.mean()) / (logs.std() or 1.0)
        lengths = Matern(np.ones(points.shape[1]), (0.1, 10.0), nu=2.5)
        kernel = ConstantKernel(1.0, (0.05, 100.0)) * lengths + WhiteKernel(0.01, (1e-5, 1.0))
        self.process = fit_process(kernel, points[measured], values[measured])
        for left in reversed(range(0 if measured.all() else IMPUTATIONS)):
            mean, deviation = self.process.predict(points[~measured], return_std=True)
            least = (values[~measured] - mean) / deviation
            filled = values.copy()
            filled[~measured] = mean + deviation * np.exp(stats.norm.logpdf(least) - stats.norm.logsf(least))
            self.process = fit_process(self.process.kernel_, points, filled, tuned=not left)

    def draw(self, points: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(posterior mean, draws of the function without noise). (n,), (n, DRAWS)"""
        mean, covariance = self.process.predict(points, return_cov=True)
        signal, noise = self.process.kernel_.k1, self.process.kernel_.k2
        covariance -= (noise.noise_level - JITTER * signal.k1.constant_value) * np.eye(len(points))
        normal = np.random.default_rng(seed).standard_normal((len(points), DRAWS))
        return mean, mean[:, None] + np.linalg.cholesky(covariance) @ normal


def locate_optimum(points: np.ndarray, losses: np.ndarray, choices: Sequence[int]) -> list[Located]:
    """Where the loss is lowest on each dimension. points: (n, dimensions), of ranges from 0 to 1, of choices the number
    of the value; losses: (n,), as `Surrogate` takes them; choices: how many values each dimension has to choose from, 0
    for a range. Empty where fewer than LEAST_MEASURED losses are finite."""
    if np.isfinite(losses).sum() < LEAST_MEASURED:
        return []
    fitted = select_fitted(losses)
    surrogate = Surrogate(encode(points[fitted], choices), losses[fitted])
    everywhere = candidates = spread_points(choices)
    width = POINTS ** (-1 / len(choices))  # as far as points are apart: between them may be a lower one
    for turn in range(TURNS):
        mean, drawn = surrogate.draw(encode(candidates, choices), seed=turn)
        best, optima = candidates[mean.argmin()], candidates[drawn.argmin(axis=0)]
        candidates = np.concatenate([everywhere, surround_points(optima, width / 2**turn, choices)])
    return [
        Located(
            float(best[i]),
            compute_interval(optima[:, i]),
            tuple(float(np.mean(optima[:, i] == value)) for value in range(count)),
        )
        for i, count in enumerate(choices)
    ]
