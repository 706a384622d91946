"""What the transfer saved: tuning at the base and carrying over, beside tuning the largest size directly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.analysis import Analysis, Result
from launch.config import Size


@dataclass(frozen=True)
class Direct:
    """The two ways on the same grid, of one parameterization. FLOPs are those of all finished runs of a size."""

    parameterization: str
    base: Size
    target: Size
    base_flops: float
    target_flops: float
    transferred: float  # the target's metric at the base's optimum; infinite if it diverged
    tuned: float  # its best

    @property
    def share(self) -> float:
        """Cost of the base's sweep over that of the target's."""
        return self.base_flops / self.target_flops

    @property
    def regret(self) -> float:
        return self.transferred - self.tuned

    def __str__(self) -> str:
        lost = f"{self.transferred:.3g}" if math.isfinite(self.transferred) else "divergence"
        return (
            f"{self.parameterization}: the sweep at {self.base} cost {100 * self.share:.3g} % of the sweep at "
            f"{self.target}; there the value carried over gives {lost}, the tuned one {self.tuned:.3g}"
            + (f" (regret {self.regret:.2g})" if math.isfinite(self.regret) else "")
        )


def compare_with_direct(
    analysis: Analysis, results: Sequence[Result], base: Size, flops: Mapping[Size, float]
) -> list[Direct]:
    """Per parameterization, against the size that costs most; none where that is the base. `flops`: of one run."""
    target = max(flops, key=lambda size: flops[size])
    found = []
    for comparison in analysis.comparisons:
        curve = comparison.curve
        if curve.size != target or target == base or not math.isfinite(curve.optimum.metric):
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
                comparison.at_base_optimum,
                curve.optimum.metric,
            )
        )
    return found
