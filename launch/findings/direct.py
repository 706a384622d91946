"""What the transfer saved: tuning at the base and carrying over, beside tuning the largest size directly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Comparison, Result
from depthmup.launch.findings.verdict import Analysis
from depthmup.launch.wording import show_cost, show_share, show_shares


@dataclass(frozen=True)
class Direct:
    """The two ways on the same grid, of one parameterization. FLOPs are those of all finished runs of a size."""

    parameterization: str
    base: Size
    target: Size
    sweep_flops: float  # at the base
    target_sweep_flops: float
    target_run_flops: float
    transferred: float  # the target's metric at the base's optimum; infinite if it diverged
    tuned: float  # what its own optimum would give: the same loss without the regret, so never more
    regret: float  # share of the target's lowest loss
    regret_interval: tuple[float, float] | None

    @property
    def cost_share(self) -> float:
        """What tuning costs beside the run that it is for: the base's sweep over one run of the target."""
        return self.sweep_flops / self.target_run_flops

    @property
    def share_of_sweep(self) -> float:
        """The base's sweep over the target's own."""
        return self.sweep_flops / self.target_sweep_flops

    def __str__(self) -> str:
        lost = f"{self.transferred:.3g}" if math.isfinite(self.transferred) else "failed runs"
        # a regret without an interval is that of the best of the runs, which says 0 where little was run
        known = (
            f" (regret {show_share(self.regret)}, {show_shares(self.regret_interval)})" if self.regret_interval else ""
        )
        return (
            f"{self.parameterization}: the sweep at {self.base} cost {show_cost(self.cost_share, 'one run')} at "
            f"{self.target}, {show_cost(self.share_of_sweep, 'a sweep')} there; "
            f"the value carried over gives {lost}, the target's own optimum {self.tuned:.3g}" + known
        )


def find_tuned_loss(comparison: Comparison) -> float:
    """The size's loss at its own optimum, from the curve that the carried value's regret is from: the best of a few
    noisy runs, which is lower or higher by luck, beside it could look like a gain. Where the carried value fails there
    is the best run value alone."""
    if math.isfinite(comparison.regret):
        return comparison.at_base_optimum / (1 + comparison.regret)
    return comparison.curve.optimum.metric


def compare_with_direct(
    analysis: Analysis, results: Sequence[Result], base: Size, flops: Mapping[Size, float]
) -> list[Direct]:
    """Per parameterization, against the size that costs most; none where that is the base. `flops`: of one run."""
    target = max(flops, key=lambda size: flops[size])
    found = []
    for comparison in analysis.comparisons:
        curve = comparison.curve
        own_base = next(
            each for each in analysis.curves if each.size == base and each.parameterization == curve.parameterization
        )
        censored = curve.optimum.censored or own_base.optimum.censored  # then nobody knows what is lost
        known = math.isfinite(curve.optimum.metric) and not math.isnan(comparison.at_base_optimum)
        if curve.size != target or target == base or not known:
            continue
        base_flops, target_flops = (
            flops[size] * sum(r.size == size and r.parameterization == curve.parameterization for r in results)
            for size in (base, target)
        )
        found.append(
            Direct(
                curve.parameterization,
                base,
                target,
                base_flops,
                target_flops,
                flops[target],
                comparison.at_base_optimum,
                find_tuned_loss(comparison),
                comparison.regret,
                None if censored else comparison.regret_interval,
            )
        )
    return found
