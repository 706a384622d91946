"""What a run of each size takes, in seconds of training, from those that ran."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from depthmup.launch.config import Size

STEP_SECONDS = 0.003  # of a step of a network of no size: a guess that two sizes replace
GUESS_WEIGHT = 0.3  # of that guess, where a size that ran has 1


def estimate_seconds(
    flops: Mapping[Size, float], known: Mapping[Size, Sequence[float]], num_steps: int
) -> dict[Size, float]:
    """Seconds of one run of each size of `flops`: the mean of its own runs in `known`, or else
    a + b * FLOPs, with both fitted to the sizes that ran: a small network's time is mostly the steps' own. Empty where
    none ran, or none for a time that was measured."""
    ran = {size: mean for size, seconds in known.items() if seconds and (mean := fmean(seconds)) > 0}
    if not ran:
        return {}
    import numpy as np  # here: `plan` and `status` of thousands of runs are quick
    from scipy.optimize import nnls

    seconds = np.array([*ran.values()])
    relative = np.stack([np.ones(len(ran)), [flops[size] for size in ran]], axis=1) / seconds[:, None]
    guess = np.array([GUESS_WEIGHT / (STEP_SECONDS * num_steps), 0.0])
    scale = relative[:, 1].max()  # FLOPs are numbers with many digits
    (constant, slope), _ = nnls(
        np.vstack([relative, guess]) / [1.0, scale], np.array([*np.ones(len(ran)), GUESS_WEIGHT])
    )
    return {size: ran.get(size, float(constant + slope / scale * each)) for size, each in flops.items()}
