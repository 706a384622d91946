"""Whether samples lie sorted by class: an order that shuffles short windows would make batches of few classes."""

import numpy as np

from depthmup.data.keys import make_generator

WINDOW = 64  # consecutive samples, as many as data.window shuffles together
BLOCKS = 1000  # most windows that are looked at, spread over all samples
SHUFFLES = 20
SORTED = 0.5  # of the classes that a shuffled window holds beyond the first


def count_classes_in_windows(windows: np.ndarray) -> float:
    """How many labels a row of (windows, samples) holds, on average."""
    ordered = np.sort(windows, axis=1)
    return 1 + float((np.diff(ordered, axis=1) != 0).sum(axis=1).mean())


def describe_class_order(labels: np.ndarray) -> str | None:
    """What is wrong where consecutive samples hold far fewer classes than they would by chance; else None.

    labels: (samples,) in the order in which the shards are read. Chance is what shuffles of the same labels give.
    """
    length = min(WINDOW, len(labels) // 8)
    if length < 2:
        return None
    starts = np.linspace(0, len(labels) - length, min(BLOCKS, len(labels) // length)).astype(np.int64)
    windows = labels[starts[:, None] + np.arange(length)]
    random = make_generator("class order")
    shuffled = [
        count_classes_in_windows(random.permutation(windows.ravel()).reshape(windows.shape)) for _ in range(SHUFFLES)
    ]
    found, chance, spread = count_classes_in_windows(windows), float(np.mean(shuffled)), float(np.std(shuffled))
    if found - 1 >= SORTED * (chance - 1) or found >= chance - 5 * spread:
        return None
    return (
        f"sorted by class: {length} samples in a row hold {found:.3g} classes, where shuffled ones hold {chance:.3g}. "
        "Training shuffles inside short windows alone, so its batches would be made of few classes"
    )
