"""Which runs may share a pack, told from their configurations alone. Without torch, so thousands are grouped fast."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from depthmup.train.config import RunConfig, find_default
from depthmup.train.rundir import RunDirectory

# What may differ between the replicas of a pack: numbers that meet the stacked weights one replica at a time.
PACKABLE_SECTIONS = ("parameterization.", "schedule.", "optimizer.role_lr.")
PACKABLE_FIELDS = {
    "seed",
    "model.base_width",
    "model.base_depth",
    "optimizer.lr",
    "optimizer.momentum",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.weight_decay_mode",
    "optimizer.tau_ema",
    "optimizer.batch_ratio",
    "optimizer.samples_ratio",
    "optimizer.beta_scaling",
    "train.clip_norm",
    "train.label_smoothing",
    "train.drop_path",
    "train.ema",
}
# What packs honour with one value for all replicas. A field that is in neither list is one that they know nothing of:
# it must have its default, or a pack would quietly leave it out. These are train.compile, channels_last and
# activation_checkpointing, and everything under parallel.
HONOURED_SECTIONS = ("model", "data")
HONOURED_FIELDS = {
    "optimizer.name",
    "optimizer.nesterov",
    "train.samples",
    "train.global_batch_size",
    "train.precision",
    "train.bf16_residual",
    "train.batch_norm_images",
    "train.evaluate",
    "train.evaluate_every",
    "train.device",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.keep_steps",
    "train.pack",
    "track.wandb",
    "track.project",
    "track.group",
    "track.tensorboard",
}

# Where train.pack is null (docs/packed.md): on a CPU, packs of wider networks or larger batches are slower than run
# after run, as a single run's tensors fit into the caches and those of a pack do not. Activations of CPU_NUMBERS are
# the largest with which packs of eight gained at these widths, whatever the network.
CPU_PACK, CPU_WIDTH, CPU_NUMBERS = 8, 32, 2**17
GPU_PACK = 16


def list_fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, default) of every field of a configuration, nested ones too."""
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from list_fields(value, f"{name}.")
        else:
            yield name, value, find_default(field)


def may_differ(name: str) -> bool:
    return name in PACKABLE_FIELDS or name.startswith(PACKABLE_SECTIONS)


def list_unknown_to_packs(config: RunConfig) -> set[str]:
    """Names of the fields that the packed step does not honour and that are not at their default."""
    unknown = {
        name
        for name, value, default in list_fields(config)
        if value != default
        and not may_differ(name)
        and name not in HONOURED_FIELDS
        and name.partition(".")[0] not in HONOURED_SECTIONS
    }
    if getattr(config.model, "num_experts", 1) > 1:  # where a token goes is the data's, and differs between replicas
        unknown.add("model.num_experts")
    return unknown


def list_common(config: RunConfig) -> dict[str, Any]:
    """What all runs of a pack must have alike, by dotted name: of train.ema whether there is an average, which takes
    memory."""
    alike = {name: value for name, value, _ in list_fields(config) if not may_differ(name)}
    return alike | {"train.ema": config.train.ema is not None}


def list_obstacles(a: RunConfig, b: RunConfig) -> list[str]:
    """Names of the fields that keep `a` and `b` out of one pack, sorted; empty when they can share one.

    They are fields that differ and may not, and fields that no pack honours: `list_obstacles(a, a)` may be non-empty.
    """
    of_a, of_b = list_common(a), list_common(b)
    different = {name for name in of_a.keys() | of_b.keys() if of_a.get(name) != of_b.get(name)}
    return sorted(different | list_unknown_to_packs(a) | list_unknown_to_packs(b))


def group_alike(configs: Sequence[RunConfig]) -> list[list[int]]:
    """The numbers of `configs` in groups whose members can share a pack, in the order of each group's first member."""
    groups: dict[Any, list[int]] = {}
    for number, config in enumerate(configs):
        key = number if list_unknown_to_packs(config) else repr(list_common(config))
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def pack_limit(config: RunConfig, on_gpu: bool) -> int:
    """Most runs to train together, as far as memory allows; 1: one by one."""
    train, model = config.train, config.model
    if train.pack is not None:
        return max(train.pack, 1)
    if on_gpu:
        return GPU_PACK
    numbers = model.width * train.global_batch_size * model.image_size**2
    return CPU_PACK if model.width <= CPU_WIDTH and numbers <= CPU_NUMBERS else 1


def stand_at_one_step(directories: Sequence[RunDirectory]) -> bool:
    """Whether the runs stand at one step: a pack goes on from there, and none gives up a checkpoint for the others."""
    return len({directory.find_newest_step() for directory in directories}) == 1
