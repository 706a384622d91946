"""Which training samples are held out for tuning: the split minival, a pure function of the index and the share."""

import hashlib
from collections.abc import Iterable

import numpy as np


def hash_names(names: Iterable[bytes]) -> np.ndarray:
    """64 bits of each name's SHA-256, uint64 (names,)."""
    return np.array([int.from_bytes(hashlib.sha256(name).digest()[:8], "little") for name in names], np.uint64)


def make_distinct(hashes: np.ndarray) -> np.ndarray:
    """`hashes`, with other ones for all but the first of equal names, as where each shard counts its samples anew."""
    order = np.argsort(hashes, kind="stable")
    at = np.arange(len(hashes))
    is_first = np.diff(hashes[order], prepend=~hashes[order[:1]]) != 0
    before = at - np.maximum.accumulate(np.where(is_first, at, 0))  # how many of the same name come before it
    again, hashes = np.flatnonzero(before), hashes.copy()
    hashes[order[again]] = hash_names(b"%d %d" % pair for pair in zip(hashes[order[again]], before[again], strict=True))
    return hashes


def count_held_out(samples: np.ndarray | int, share: float) -> np.ndarray:
    """How many of so many samples are held out, int64."""
    return np.floor(np.multiply(samples, share) + 0.5).astype(np.int64)


def choose_held_out(labels: np.ndarray, hashes: np.ndarray, share: float) -> np.ndarray:
    """Whether each sample is held out, bool (samples,): of every label its share, up to one sample; of all together
    count_held_out(samples, share).

    labels: (samples,). hashes: (samples,) of the samples' names. The lowest of each label are held out. So neither the
    order nor the sizes of the shards matter, and a larger share holds out what a smaller one does and more (of a label
    that is not rounded down).
    """
    order = np.lexsort((make_distinct(hashes), labels))
    _, counts = np.unique(labels, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    held_out = np.diff(count_held_out(ends, share))  # of each label
    place = np.arange(len(labels)) - np.repeat(ends[:-1], counts)  # of a sample among those of its label
    chosen = np.zeros(len(labels), bool)
    chosen[order] = place < np.repeat(held_out, counts)
    return chosen
