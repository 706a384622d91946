"""What so many draws say of a share: how good the transferred values are among perturbed ones."""

from dataclasses import dataclass
from typing import Literal

from scipy import stats

SURE = 0.95  # of each bound alone

Verdict = Literal["among the best", "not among the best", "undecided"]


@dataclass(frozen=True)
class Share:
    """Of `runs` independent draws `better` had a property: what that says of the share of all that have it."""

    better: int
    runs: int

    @property
    def high(self) -> float:
        """The share is at most this with a probability of SURE (Clopper and Pearson, Biometrika 26, 1934): where none
        of n is better it is 1 - 0.05^(1/n), which is below 5 % from n = 59 on."""
        if self.better == self.runs:
            return 1.0
        return float(stats.beta.ppf(SURE, self.better + 1, self.runs - self.better))

    @property
    def low(self) -> float:
        """The share is at least this with a probability of SURE."""
        if not self.better:
            return 0.0
        return float(stats.beta.ppf(1 - SURE, self.better, self.runs - self.better + 1))

    def judge(self, top: float) -> Verdict:
        """Whether what so few are better than is among the best share `top` of all."""
        if self.high <= top:
            return "among the best"
        return "not among the best" if self.low > top else "undecided"
