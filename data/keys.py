"""Random numbers by key: what is drawn depends on nothing but what it is for and the integers that number it."""

import hashlib
import json

import numpy as np


def seed_for(purpose: str, *key: int) -> int:
    """An integer below 2**256, another one for every (purpose, *key).

    By SHA-256, since numpy's SeedSequence pads with zeros and splits large numbers: (7,) would be (7, 0), and
    2**32 + 7 would be (7, 1).
    """
    return int.from_bytes(hashlib.sha256(json.dumps((purpose, *key)).encode()).digest(), "big")


def make_generator(purpose: str, *key: int) -> np.random.Generator:
    return np.random.default_rng(seed_for(purpose, *key))
