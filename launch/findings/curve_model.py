"""One model of a study's curves: log loss against a hyperparameter, from which every interval of a report comes.

The run of seed s at x octaves has log loss f(x) + offset(s) + noise. Each curve f is a smooth function:

    f(x) = quadratic(x) + skew x^3 / 6 + quartic x^4 / 24 + rough(x)
    skew ~ N(m c, (v c)^2),   quartic ~ N(0, (0.3 c)^2),   rough'''' = r c white noise

with c the curve's curvature, and x from the middle of the values. Quadratic and offsets are free; m, v and r are the
study's. So a parabola costs nothing, curves whose shape changes with size are followed, and what lies between the
measured values is as unsure as the shape allows (Wahba 1978; the intervals of smoothing splines, Nychka 1988). The
variance of the noise is each curve's own, moderated towards that of the study's other curves (Smyth 2004). All of these
are integrated over, none is plugged in.
The edge lies anywhere between the last value that trains and one at which runs fail: no draw has its optimum beyond it.
docs/verdict.md says the model in one page, and what simulation says of its intervals.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from depthmup.launch.findings.value_effects import ValueEffects, estimate_effects, estimate_prior

DRAWS = 2000  # of every curve; among them a bound's place is known to one per cent
LEAST_DRAWS = 20  # that bend upwards, beside a failing value, or the runs themselves deny that the curve does
STEPS_PER_OCTAVE = 8  # of the grid on which curves are drawn; between its points the lowest is found by a parabola
REACH_OCTAVES = 3.0  # a value is left out further than this from the best, or above REACH_LOSS, unless it is ...
REACH_LOSS = 0.25  # (log of its loss over the lowest)
MIN_REACH = 2  # ... one of so many to either side, ...
LEAST_REACH_OCTAVES = 1.0  # ... no further than this, as on a fine lattice, ...
AS_GOOD = 0.02  # ... or on a plateau: log of its loss over the lowest

MEAN_SKEW = np.linspace(-1.2, 1.2, 13)  # m: change of the curvature within an octave, in curvatures
MEAN_SKEW_DEVIATION = 0.6  # of m's normal prior
SKEW_DEVIATION = np.array([0.15, 0.4])  # v
QUARTIC_DEVIATION = 0.3
ROUGHNESS = np.array([0.1, 0.4, 1.5])  # r
NOISE = 2.0 ** np.linspace(-1.5, 1.5, 7)  # standard deviations that are tried, in that of the moderated estimate
LEAST_MODEL_NOISE = 1e-4  # of a log loss: runs that repeat to the last digit say nothing of other seeds


# ---------------------------------------------------------------- one curve


def compute_integrated_noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Covariance of white noise integrated four times from 0: int_0^min (a-u)^3 (b-u)^3 / 36 du. (len(a), len(b))"""
    low, gap = np.minimum(a[:, None], b), np.abs(a[:, None] - b)
    return np.asarray((low**7 / 7 + gap * low**6 / 2 + 3 * gap**2 * low**5 / 5 + gap**3 * low**4 / 4) / 36)


class CurveFit:
    """The model of one curve at every noise, roughness and deviation of the skew that are tried.

    low, high: octaves between which the optimum is looked for: beyond the fitted values, those at which runs fail.
    """

    def __init__(self, effects: ValueEffects, low: float, high: float) -> None:
        self.effects = effects
        steps = max(math.ceil((high - low) * STEPS_PER_OCTAVE), 2)  # a parabola takes three points
        self.grid = np.linspace(low, high, steps + 1)
        points = np.concatenate([effects.x, self.grid])
        self.cubic = (points - effects.x.mean()) ** 3 / 6  # (values + grid points,)
        self.quartic = QUARTIC_DEVIATION * (points - effects.x.mean()) ** 4 / 24
        self.basis = (points - effects.x.mean())[:, None] ** np.arange(3)
        self.rough = compute_integrated_noise(points - points.min(), points - points.min())
        self.count = len(effects.x)
        basis = self.basis[: self.count]
        weight = np.linalg.pinv(effects.covariance + 1e-9 * np.eye(self.count))
        information = np.linalg.inv(basis.T @ weight @ basis)
        quadratic = information @ basis.T @ weight @ effects.mean
        left = effects.mean - basis @ quadratic
        self.misfit, self.misfit_freedom = float(left @ weight @ left), self.count - basis.shape[1]
        self.curvature, self.curvature_error = 2 * abs(quadratic[2]), 2 * math.sqrt(information[2, 2])

    def set_noise(self, deviation: float) -> None:
        """deviation: the moderated estimate of the noise's standard deviation, about which others are tried."""
        self.noises = deviation * NOISE
        # the curve's curvature, or what could be told from none
        self.scale = max(self.curvature, self.curvature_error * deviation)

    def prior(self, rows: slice) -> np.ndarray:
        """Covariance of f beyond its quadratic between the points `rows` and the values, (roughness, deviation, ...)"""
        cubic, quartic = (np.outer(term[rows], term[: self.count]) for term in (self.cubic, self.quartic))
        by_roughness = np.multiply.outer(ROUGHNESS**2, self.rough[rows, : self.count])[:, None]
        by_deviation = np.multiply.outer(SKEW_DEVIATION**2, cubic)[None]
        return np.asarray(self.scale**2 * (quartic + by_roughness + by_deviation))

    @cached_property
    def inverse(self) -> np.ndarray:
        """Of the covariance of the value effects: (noises, roughness, deviations, values, values)"""
        noise = np.multiply.outer(self.noises**2, self.effects.covariance)[:, None, None]
        return np.linalg.inv(noise + self.prior(slice(self.count))[None])

    @cached_property
    def information(self) -> np.ndarray:
        """Of the quadratic's coefficients: (noises, roughness, deviations, 3, 3)"""
        basis = self.basis[: self.count]
        return np.asarray(basis.T @ self.inverse @ basis)

    @cached_property
    def quadratic(self) -> np.ndarray:
        """What takes value effects to the quadratic's coefficients: (..., 3, values)"""
        return np.linalg.solve(self.information, self.basis[: self.count].T @ self.inverse)

    def log_likelihood(self) -> np.ndarray:
        """Restricted log likelihood of the value effects and of the residuals between seeds.

        (noises, roughness, deviations, mean skews)
        """
        projection = self.inverse - self.inverse @ self.basis[: self.count] @ self.quadratic
        mean, cubic = self.effects.mean, self.scale * self.cubic[: self.count]
        square, cross, own = (a @ projection @ b for a, b in ((mean, mean), (mean, cubic), (cubic, cubic)))
        quadratic = square[..., None] - 2 * MEAN_SKEW * cross[..., None] + MEAN_SKEW**2 * own[..., None]
        determinant = np.linalg.slogdet(self.information)[1] - np.linalg.slogdet(self.inverse)[1]
        between = self.effects.freedom * np.log(self.noises) + self.effects.residual / (2 * self.noises**2)
        return np.asarray(-0.5 * (quadratic + determinant[..., None]) - between[:, None, None, None])

    def draw(self, chosen: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Curves of the posterior on the grid: (draws, points).

        chosen: (draws, 4) indices of noise, roughness, deviation and mean skew. A curve of the prior is drawn and
        corrected by what the runs say of its difference from the truth (Matheron's rule), the quadratic being free.
        """
        values, points = slice(self.count), slice(self.count, None)
        root = np.linalg.cholesky(self.rough + 1e-10 * np.trace(self.rough) * np.eye(len(self.rough)))
        noise_root = np.linalg.cholesky(self.effects.covariance + 1e-12 * np.eye(self.count))
        noise, roughness, deviation, skew = chosen.T
        count = len(chosen)
        drawn = self.scale * ROUGHNESS[roughness, None] * (generator.standard_normal((count, len(root))) @ root.T)
        skews = MEAN_SKEW[skew] + SKEW_DEVIATION[deviation] * generator.standard_normal(count)
        drawn += self.scale * skews[:, None] * self.cubic
        drawn += self.scale * generator.standard_normal((count, 1)) * self.quartic
        errors = self.noises[noise, None] * (generator.standard_normal((count, self.count)) @ noise_root.T)
        gap = self.effects.mean - drawn[:, values] - errors
        found = drawn[:, points]
        prior = self.prior(points)
        for i, j, k in np.unique(chosen[:, :3], axis=0):
            rows = np.flatnonzero((noise == i) & (roughness == j) & (deviation == k))
            quadratic = gap[rows] @ self.quadratic[i, j, k].T  # (rows, 3)
            left = gap[rows] - quadratic @ self.basis[values].T
            found[rows] += quadratic @ self.basis[points].T + left @ self.inverse[i, j, k] @ prior[j, k].T
        return found

    def keep_valleys(self, draws: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Beside a value at which runs fail nothing holds a draw up: those that bend downwards over the grid, and fall
        ever faster, are replaced by others, unless nearly all do. (draws, points)"""
        if (self.grid[0], self.grid[-1]) == (self.effects.x[0], self.effects.x[-1]):
            return draws
        valleys = np.flatnonzero(draws[:, 0] + draws[:, -1] > 2 * draws[:, len(self.grid) // 2])
        if len(valleys) < LEAST_DRAWS:
            return draws
        chosen = np.arange(len(draws))
        others = np.setdiff1d(chosen, valleys)
        chosen[others] = generator.choice(valleys, len(others))
        return draws[chosen]

    def draw_edges(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Octaves between which runs train, (count, 2): anywhere up to a failing value; else the grid's ends."""
        share = generator.random((count, 2))
        ends, trained = self.grid[[0, -1]], self.effects.x[[0, -1]]
        return np.asarray(trained + share * (ends - trained))


@dataclass(frozen=True)
class Posterior:
    """What the runs say of one curve. Draws of the curves of one study go together."""

    grid: np.ndarray  # (points,) octaves
    draws: np.ndarray  # (DRAWS, points) log loss
    edges: np.ndarray  # (DRAWS, 2) octaves between which runs train

    @cached_property
    def _lowest(self) -> tuple[np.ndarray, np.ndarray]:
        """(octaves, log loss) of each draw's lowest point between its edges, between grid points by a parabola."""
        trains = (self.grid >= self.edges[:, :1]) & (self.grid <= self.edges[:, 1:])
        best, rows = np.where(trains, self.draws, math.inf).argmin(axis=1), np.arange(len(self.draws))
        inner, step = np.clip(best, 1, len(self.grid) - 2), self.grid[1] - self.grid[0]
        left, centre, right = (self.draws[rows, inner + side] for side in (-1, 0, 1))
        slope, bend = (right - left) / 2, left - 2 * centre + right
        # in grid steps from the inner point: the vertex, or whither the curve falls, but not beyond an edge
        lowest = np.divide(-slope, bend, out=-np.sign(slope), where=bend > 0)
        low, high = ((self.edges - self.grid[inner, None]) / step).T
        share = np.clip(lowest, np.maximum(low, -1.0), np.minimum(high, 1.0))
        return self.grid[inner] + share * step, centre + share * slope + share**2 * bend / 2

    @property
    def optima(self) -> np.ndarray:
        """Octaves. (DRAWS,)"""
        return self._lowest[0]

    @property
    def lowest(self) -> np.ndarray:
        """Log loss at the optimum. (DRAWS,)"""
        return self._lowest[1]

    def at(self, x: float) -> np.ndarray:
        """Log loss at `x` octaves, between grid points by a parabola, as the lowest is: a straight line lies above it
        by up to curvature x step^2 / 8. NaN outside of the grid. (DRAWS,)"""
        if not self.grid[0] <= x <= self.grid[-1]:
            return np.full(len(self.draws), math.nan)
        inner = int(np.clip(np.abs(self.grid - x).argmin(), 1, len(self.grid) - 2))
        share = (x - self.grid[inner]) / (self.grid[1] - self.grid[0])
        left, centre, right = self.draws[:, inner - 1 : inner + 2].T
        return np.asarray(centre + share * (right - left) / 2 + share**2 * (left - 2 * centre + right) / 2)

    def regrets(self, x: float) -> np.ndarray:
        """Log of the loss at `x` octaves over the lowest, infinite beyond an edge. (DRAWS,)"""
        beyond = (x < self.edges[:, 0]) | (x > self.edges[:, 1])
        inside = self.grid[0] <= x <= self.grid[-1]
        return np.where(beyond & inside, math.inf, np.maximum(self.at(x) - self.lowest, 0.0))


# ---------------------------------------------------------------- a study


def average_seeds(y: np.ndarray) -> np.ndarray:
    """Mean over seeds, (values,): infinite where any seed failed, NaN where no seed ran.

    Seeds may have run at other values: their offsets, by least squares, are taken off.
    """
    failed, ran = np.isinf(y).any(axis=0), ~np.isnan(y).all(axis=0)
    mean = np.where(failed, math.inf, math.nan)
    kept = np.flatnonzero(ran & ~failed)
    if len(kept):
        mean[kept] = estimate_effects(kept, y[:, kept]).mean
    return mean


def select_fitted_values(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Indices of the values that a curve is fitted to: those about the lowest, without a gap. `mean`: inf, failed."""
    best = int(np.where(np.isfinite(mean), mean, math.inf).argmin())
    kept = [best]
    for step in (-1, 1):
        index = best + step
        while 0 <= index < len(x) and np.isfinite(mean[index]):
            excess = mean[index] - mean[best]
            near = excess <= (REACH_LOSS if abs(x[index] - x[best]) <= REACH_OCTAVES else AS_GOOD)
            beside = abs(index - best) <= MIN_REACH or abs(x[index] - x[best]) <= LEAST_REACH_OCTAVES
            if not near and not beside:
                break
            kept.append(index)
            index += step
    return np.array(sorted(kept))


def prepare_fit(x: np.ndarray, y: np.ndarray) -> CurveFit | None:
    """None where fewer than three values about the lowest trained. Beside a value at which runs fail, the optimum may
    lie anywhere up to that value."""
    mean = average_seeds(y)
    if not np.isfinite(mean).any():
        return None
    kept = select_fitted_values(x, mean)
    if len(kept) < 3:
        return None
    low, high = kept[0], kept[-1]
    low -= low > 0 and np.isinf(mean[low - 1])
    high += high + 1 < len(x) and np.isinf(mean[high + 1])
    return CurveFit(estimate_effects(x[kept], y[:, kept]), float(x[low]), float(x[high]))


def fit_curves(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Posterior | None]:
    """Posteriors of a study's curves, each given as x: (values,) octaves and y: (seeds, values) log losses, infinite
    where a run failed, NaN where there is none. None for a curve that `prepare_fit` cannot fit, and for all where
    nothing tells the noise."""
    prepared = [prepare_fit(x, y) for x, y in curves]
    fits = [each for each in prepared if each]
    # where seeds were not repeated, the misfit of parabolas stands for the noise
    repeated = any(each.effects.freedom for each in fits)
    squares = np.array([each.effects.residual if repeated else each.misfit for each in fits])
    freedoms = np.array([each.effects.freedom if repeated else each.misfit_freedom for each in fits], dtype=float)
    if not freedoms.any():
        return [None] * len(curves)
    known = freedoms > 0
    variances = np.maximum(squares[known] / freedoms[known], LEAST_MODEL_NOISE**2)
    prior_freedom, prior_variance = estimate_prior(variances, freedoms[known])
    tables = []
    for each, square, freedom in zip(fits, squares, freedoms, strict=True):
        moderated = (prior_freedom * prior_variance + square) / max(prior_freedom + freedom, 1.0)
        each.set_noise(math.sqrt(max(moderated, LEAST_MODEL_NOISE**2)))
        # the prior of a variance, scaled inverse chi squared, per logarithm of the deviation
        prior = -prior_freedom * (np.log(each.noises) + prior_variance / (2 * each.noises**2))
        tables.append(each.log_likelihood() + prior[:, None, None, None])
    generator, of_edges = np.random.default_rng(0), np.random.default_rng(1)
    shared = sum(np.logaddexp.reduce(table, axis=0) for table in tables) - 0.5 * (MEAN_SKEW / MEAN_SKEW_DEVIATION) ** 2
    weights = np.exp(shared - shared.max())
    common = generator.choice(weights.size, DRAWS, p=(weights / weights.sum()).ravel())
    found = []
    for each, table in zip(fits, tables, strict=True):
        of_noise = table.reshape(len(NOISE), -1)[:, common]
        of_noise = np.exp(of_noise - of_noise.max(axis=0)).cumsum(axis=0)
        noise = (of_noise < generator.random(DRAWS) * of_noise[-1]).sum(axis=0)
        chosen = np.stack([noise, *np.unravel_index(common, weights.shape)], axis=1)
        draws = each.keep_valleys(each.draw(chosen, generator), of_edges)
        found.append(Posterior(each.grid, draws, each.draw_edges(DRAWS, of_edges)))
    posteriors = iter(found)
    return [next(posteriors) if each else None for each in prepared]
