"""What more runs would tell of a verdict, and what it may be expected to cost: the price at which a design ends."""

import math
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Comparison, Curve
from depthmup.launch.findings.points import OCTAVE, Design, list_failing_values, list_runs, round_octaves
from depthmup.launch.findings.precision import SURENESS, Aim, Run, estimate_curvature, estimate_noise
from depthmup.launch.findings.verdict import Analysis, judge_size

NEAR = 0.5  # octaves: a value that was run so near to a wanted one takes its place
SPREADS = (0.5, 1.0, 1.5)  # octaves of new values about the carried one
# Shares of the budget, one for each parameterization, that a settled verdict may be expected to cost: those of several
# must not add up to more than there is. Of one alone the price is above what such verdicts then took in simulation, as
# chances of several sizes are multiplied as if independent
DEAREST, DEAREST_ALONE = 1.0, 3.0
SPENDINGS = tuple(2.0**-halvings for halvings in range(5))  # of what is left, of which the best price is the verdict's
PROBABLE = 0.5  # that one size says that the value costs: the others need not be settled then
MOST_AHEAD = 60  # runs of one size that are looked ahead


class Outlook:
    """What runs to come would tell of one parameterization."""

    def __init__(self, design: Design, analysis: Analysis, name: str, left: float) -> None:
        """left: FLOPs of the budget."""
        open_ones = sum(each.verdict == "inconclusive" for each in analysis.judgements)
        self.share = left / max(open_ones, 1)  # of what is left, for each verdict that is open
        self.design, self.analysis, self.name = design, analysis, name

    @property
    def dearest(self) -> float:
        return DEAREST if len(self.design.parameterizations) > 1 else DEAREST_ALONE

    def find_curve(self, size: Size) -> Curve | None:
        found = (each for each in self.analysis.curves if (each.parameterization, each.size) == (self.name, size))
        return next(found, None)

    def aim_at(self, curve: Curve, x: float) -> Aim:
        assert curve.posterior is not None
        distances = curve.posterior.optima - x
        runs = tuple(sorted(run for run in list_runs(curve) if np.isfinite(curve.mean[curve.at(run[0])])))
        own = [each for each in self.analysis.curves if each.parameterization == self.name]
        noise = estimate_noise(own)
        base = self.find_curve(self.design.sizes[0])
        curvature = math.sqrt(
            estimate_curvature(curve, x) * estimate_curvature(base or curve, x)
        )  # one curve's own is uncertain
        low, high = np.quantile(distances, [0.05, 0.95])
        return Aim(runs, x, noise, curvature, float(np.median(distances)), float(high - low) / (2 * SURENESS))

    def find_fresh_seeds(self, curve: Curve, runs: Sequence[Run]) -> Iterator[int]:
        """Seeds that the curve does not have, failed runs included."""
        known = {*curve.seeds, *(seed for _, seed in runs)}
        return (seed for index in count() if (seed := self.design.seed(index)) not in known)

    def list_values(self, curve: Curve, x: float) -> list[float]:
        """Octaves at which more runs may be put: about x, where none fails."""
        low, high = self.find_trained_range(curve, x)
        about = (x + side * spread for spread in SPREADS for side in (-1, 1))
        return sorted(
            {
                round_octaves(x),
                *(round_octaves(each) for each in about if low < each < high and self.design.is_valid(each)),
            }
        )

    def list_row(self, curve: Curve, x: float) -> list[float]:
        """The four values of a further seed: an octave to either side of x, or what was run near that, and an octave
        beyond these. Empty where the first two were not run, or runs fail about there. Seeds in whole rows tell the
        curvature too, of which a slope's regret is a quotient."""
        low, high = self.find_trained_range(curve, x)
        trained = curve.x[np.isfinite(curve.mean)]

        def find_near(target: float) -> float | None:
            near = trained[np.abs(trained - target) <= NEAR]
            return float(near[np.abs(near - target).argmin()]) if len(near) else None

        row = []
        for side in (-OCTAVE, OCTAVE):
            inner = find_near(x + side)
            if inner is None:
                return []
            outer = find_near(inner + side)
            row += [inner, inner + side if outer is None else outer]
        fits = all(low < each < high and self.design.is_valid(each) for each in row)
        return sorted(map(round_octaves, row)) if fits else []

    def find_trained_range(self, curve: Curve, x: float) -> tuple[float, float]:
        """Octaves between which values may be put: not beyond one about x at which runs fail."""
        bad = list_failing_values(curve)
        low = max((value for value in bad if value < x), default=-math.inf)
        high = min((value for value in bad if value > x), default=math.inf)
        return float(low), float(high)

    def foresee_outcomes(self, comparison: Comparison, carried: float, flops: float) -> tuple[float, float]:
        """Probabilities that the size is known to lose nothing, and that it is known to lose something, after `flops`
        are spent on it."""
        curve, aim = comparison.curve, self.aim_at(comparison.curve, carried)
        trained = {round_octaves(x) for x in curve.x[np.isfinite(curve.mean)] if abs(x - carried) <= max(SPREADS)}
        values = sorted(trained | set(self.list_values(curve, carried)))
        pairs = list(zip(values, reversed(values), strict=True))[: len(values) // 2]
        rows = [row] if (row := self.list_row(curve, carried)) else pairs
        seeds = self.find_fresh_seeds(curve, aim.runs)
        rest: list[Run] = []
        for index in range(min(int(flops / self.design.flops[curve.size]), MOST_AHEAD) // len(rows[0])):
            seed = next(seeds)
            rest += [(x, seed) for x in rows[index % len(rows)]]
        return aim.outcomes(aim.after([*aim.runs, *rest]), self.design.limits)

    def choose_deciding(self, comparisons: Sequence[Comparison], carried: float) -> list[Comparison]:
        """Those of the open sizes whose runs decide: all, unless one will probably say that the value costs; then this
        one, and those that may still say that it does not transfer."""
        against = [self.foresee_outcomes(each, carried, self.share / len(comparisons))[1] for each in comparisons]
        witness = int(np.argmax(against))
        if against[witness] < PROBABLE:
            return list(comparisons)
        return [
            each
            for number, each in enumerate(comparisons)
            if number == witness or not judge_size(each, self.design.limits).is_bounded
        ]

    def find_price(self, comparisons: Sequence[Comparison], carried: float) -> float:
        """FLOPs that a verdict is expected to cost, in shares of the study's whole budget: what its parameterization's
        runs took so far, and what is yet to be spent on the sizes, equally, over the probability that this settles
        all of them. What was spent counts, as a cost about the limit promises an answer in every round anew."""
        whole = self.design.budget / len(self.design.parameterizations)
        own = (each for each in self.analysis.curves if each.parameterization == self.name)
        before = sum(self.design.flops[curve.size] * len(list_runs(curve)) for curve in own)
        found = []
        for part in SPENDINGS:
            spent = part * self.share
            chances = (sum(self.foresee_outcomes(each, carried, spent / len(comparisons))) for each in comparisons)
            found.append(spent / whole / max(math.prod(chances), 1e-9))
        return before / whole + min(found)


def show_price(price: float) -> str:
    """'3.2 times', '1.04 times', 'over 100 times'"""
    return "over 100 times" if price > 100 else f"{price:.3g} times"
