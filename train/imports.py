"""What a process that trains imports, before its first step."""

import gc
import sys
from importlib import import_module

# An optimizer would import the second at its first step.
TRAINING = ("depthmup.train.loop", "torch._dynamo")


def import_uncollected(*names: str) -> None:
    """Imports modules while no garbage is collected. They are half a million objects with torch, all of which stay: a
    fifth of the seconds of its import went into looking through them. Nor do later collections look through them."""
    if all(name in sys.modules for name in names):
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            import_module(name)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
