"""What runs cost in FLOPs: by formula, or counted on the network, which needs torch; those counts are kept on disk."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from depthmup.data.files import write_atomically
from depthmup.launch.config import Size
from depthmup.launch.paths import PACKAGE, find_user_folder
from depthmup.launch.runs.flops import count_by_formula
from depthmup.launch.runs.planned import PlannedRun
from depthmup.train.config import RunConfig, find_identity


@cache
def hash_counting_code() -> str:
    hashed = hashlib.sha256("".join(version(name) for name in ("torch", "timm")).encode())
    for file in sorted((PACKAGE / "models").rglob("*.py")):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()[:12]


def locate_cache() -> Path | None:
    """Counts made by this code and these libraries: another version counts anew. None where the user has no home."""
    folder = find_user_folder("XDG_CACHE_HOME", ".cache")
    return folder / f"flops-{hash_counting_code()}.json" if folder else None


def read_cache(file: Path | None) -> dict[str, list[int]]:
    """Empty where there is none that can be read: then all is counted again."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def count_network(config: RunConfig) -> list[int]:
    """[parameters, FLOPs of one image in training]."""
    model = config.model
    if counted := count_by_formula(model):
        parameters, forward = counted
        return [parameters, 3 * forward]  # twice the forward pass for the gradients of inputs and of weights
    from depthmup.models.build import build_meta  # torch, which most commands do not need
    from depthmup.models.flops import count_parameters, count_training_flops

    network = build_meta(model, config.parameterization).network
    shape = (model.in_channels, model.image_size, model.image_size)
    return [count_parameters(network), count_training_flops(network, shape)]


def make_cache_key(model: Any) -> str:
    return json.dumps(find_identity(model), sort_keys=True)


def count_flops(runs: Sequence[PlannedRun]) -> dict[Size, tuple[int, int]]:
    """Per size: (parameters, FLOPs of one run: forward and backward over all its samples)."""
    first = {run.size: run.config for run in reversed(runs)}
    counted = dict(zip(first, count_runs(list(first.values())), strict=True))
    return {run.size: counted[run.size] for run in runs}


def count_runs(configs: Sequence[RunConfig]) -> list[tuple[int, int]]:
    """Of each run: (parameters, FLOPs forward and backward over all its samples)."""
    file = locate_cache()
    known = read_cache(file)
    missing = {name: config for config in configs if (name := make_cache_key(config.model)) not in known}
    if missing:
        known |= {name: count_network(config) for name, config in missing.items()}
        with suppress(OSError):  # a home that cannot be written to costs time, not correctness
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps(known).encode())
    counted = []
    for config in configs:
        parameters, each = known[make_cache_key(config.model)]
        counted.append((parameters, each * config.train.num_steps * config.train.global_batch_size))
    return counted
