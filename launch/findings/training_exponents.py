"""How the optimum moves with the global batch and with the samples: an exponent with its interval, and what carrying
the value along it costs.

The slope of log2 optimum over log2 of the axis, by least squares weighted with the optima's own variances, of every
draw of the curve model (launch.findings.curve_model). The swept value is the base's, to which the rules' own power of
the axis is applied already: where the learning rate is swept, the exponent of the rate itself is theirs plus the slope.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtri

from depthmup.launch.axes import TRAINING_AXES
from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Comparison, Curve, compare
from depthmup.launch.findings.convergence import select_along_axis
from depthmup.launch.findings.intervals import CONFIDENCE, compute_interval
from depthmup.launch.findings.verdict import Analysis, Judgement, Limits, judge

KNOWN = 0.25  # half-width of an interval within which an exponent is used: it tells 1/2 from 0 and from 1
MISFIT = 0.99  # confidence at which optima that scatter about the power law refute it


@dataclass(frozen=True)
class Exponent:
    """Of one parameterization along one axis. `measured` is None where `remark` says why."""

    parameterization: str
    axis: str
    hyperparameter: str
    rule: float | None  # of the learning rate, where that is swept: the power of the axis that its runs had
    measured: float | None
    interval: tuple[float, float] | None
    span: tuple[int, int]  # smallest and largest of the axis
    sizes: int
    remark: str

    @property
    def is_known(self) -> bool:
        """Well enough to be used."""
        return self.interval is not None and self.interval[1] - self.interval[0] <= 2 * KNOWN and not self.remark

    @property
    def power(self) -> str:
        return f"{self.axis}^{self.measured:.2f}"

    @property
    def slope(self) -> float:
        """Octaves of the swept value per octave of the axis: what the rule leaves."""
        assert self.measured is not None
        return self.measured - (self.rule or 0.0)

    @property
    def agrees(self) -> bool | None:
        """Whether the rule's own exponent lies in the interval; None where the rules have none or nothing is known."""
        if self.rule is None or self.interval is None:
            return None
        return self.interval[0] <= self.rule <= self.interval[1]

    def __str__(self) -> str:
        if self.measured is None or self.interval is None:
            return f"{self.parameterization}: no exponent over {self.axis}: {self.remark}"
        low, high = self.interval
        said = (
            f"{self.parameterization}: the optimum of {self.hyperparameter} goes as {self.power} "
            f"({CONFIDENCE:.0%} interval {low:.2f} to {high:.2f}, {self.sizes} sizes from {self.span[0]} to "
            f"{self.span[1]})"
        )
        if self.rule is not None:
            said += f"; the rule has {self.rule:.3g}, which lies {'in' if self.agrees else 'outside of'} it"
        if self.remark:
            return f"{said}; not to be used: {self.remark}"
        return said if self.is_known else f"{said}; too wide to be used"


def explain_unknown(curve: Curve) -> str | None:
    """What keeps the curve's optimum from being one end of a slope."""
    if curve.optimum.x is None or curve.posterior is None:
        return "has no optimum that is known to be one"
    if curve.optimum.censored:
        return f"has its optimum on the {curve.optimum.censored} edge"
    if curve.optimum.interval is None or not np.isfinite(curve.optimum.interval).all():
        return "has an optimum that may lie beyond the values"
    return None


def measure_exponent(
    shown: Sequence[Comparison], axis: str, hyperparameter: str, rule: float | None
) -> Exponent | None:
    """The exponent over `axis`, from comparisons that differ in it alone; None where fewer than two do."""
    curves = [comparison.curve for comparison in shown]
    values = [int(getattr(curve.size, axis)) for curve in curves]
    if len(set(values)) < 2:
        return None
    name, span = curves[0].parameterization, (min(values), max(values))

    def found(measured: float | None, interval: tuple[float, float] | None, remark: str) -> Exponent:
        return Exponent(name, axis, hyperparameter, rule, measured, interval, span, len(values), remark)

    if troubles := [
        f"{axis} {value} {why}" for c, value in zip(curves, values, strict=True) if (why := explain_unknown(c))
    ]:
        return found(None, None, "; ".join(troubles))
    optima = np.array([curve.posterior.optima for curve in curves if curve.posterior])  # (sizes, draws)
    x = np.log2(values)
    variances = np.maximum(optima.var(axis=1), 1e-6)
    weights = 1 / variances
    away = x - np.average(x, weights=weights)
    shares = weights * away / (weights * away**2).sum()
    slopes = shares @ optima
    middle = np.median(optima, axis=1)
    residual = middle - np.average(middle, weights=weights) - away * float(shares @ middle)
    misfit, freedom = float((weights * residual**2).sum()), len(values) - 2
    centre = float(np.median(slopes))
    # optima that scatter more than they should about the line widen the interval as much
    slopes = centre + (slopes - centre) * max(1.0, math.sqrt(misfit / freedom) if freedom else 1.0)
    own = rule or 0.0
    low, high = compute_interval(slopes)
    refuted = bool(freedom) and misfit > chdtri(freedom, 1 - MISFIT)
    remark = "the optima do not lie on one power law" if refuted else ""
    return found(own + centre, (own + low, own + high), remark)


def measure_exponents(
    analysis: Analysis, base: Size, hyperparameter: str, rules: Mapping[str, Mapping[str, float]]
) -> list[Exponent]:
    """Of every parameterization along every axis of TRAINING_AXES that the study has. `rules`: by parameterization and
    axis the learning rate's own exponent; empty where another value is swept."""
    found = []
    for judgement in analysis.judgements:
        name = judgement.parameterization
        own = [c for c in analysis.comparisons if c.curve.parameterization == name]
        for axis in TRAINING_AXES:
            if axis in base.axes:
                found.append(
                    measure_exponent(
                        select_along_axis(own, base, axis), axis, hyperparameter, rules.get(name, {}).get(axis)
                    )
                )
    return [each for each in found if each]


def predict_shift(size: Size, base: Size, known: Sequence[Exponent]) -> float:
    """Octaves by which the swept value moves from the base to `size` along the exponents."""
    return sum(each.slope * math.log2(getattr(size, each.axis) / getattr(base, each.axis)) for each in known)


def judge_along(
    analysis: Analysis, name: str, base: Size, carried: float, known: Sequence[Exponent], limits: Limits
) -> Judgement:
    """The verdict on a parameterization whose value is carried (`carried`: octaves, at the base) along `known`
    exponents, which were fitted to the same runs."""
    own = [c.curve for c in analysis.comparisons if c.curve.parameterization == name]
    base_curve = next(curve for curve in own if curve.size == base)
    others = [
        compare(base_curve, curve, carried + predict_shift(curve.size, base, known))
        for curve in own
        if curve.size != base
    ]
    return judge(base_curve, others, limits)
