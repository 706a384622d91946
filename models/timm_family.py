"""Any of timm's networks whose width and depth are arguments (models.timm_sizes), with roles found by looking."""

import difflib
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from depthmup.models.config import TimmConfig
from depthmup.models.discovery.find import find_roles
from depthmup.models.errors import ModelError
from depthmup.models.family import Family, Roles
from depthmup.models.timm_sizes import SIZES, SizeArguments, times


def architecture_module(name: str) -> str:
    """timm's module of the network called `name`. Raises ModelError for a name that timm, or the table, lacks."""
    import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
    import timm
    from timm.models import is_model_in_modules, model_entrypoint

    if "." in name or not timm.is_model(name):
        nearest = ", ".join(difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3, cutoff=0))
        what = "has a tag of weights, which are not loaded" if "." in name else "is unknown to timm"
        raise ModelError(f"model.timm_name: {name!r} {what}; nearest: {nearest}")
    module = model_entrypoint(name).__module__.rpartition(".")[2]
    if module not in SIZES or not is_model_in_modules(name, [module]):
        raise ModelError(
            f"model.timm_name: {name} is of timm's module {module}, whose size arguments are not in "
            f"models/timm_sizes.py; known modules: {', '.join(sorted(SIZES))}"
        )
    return module


def size_arguments(config: TimmConfig, row: SizeArguments) -> dict[str, Any]:
    """What timm is told of the network's size, classes and images. Raises ModelError for keys that do not fit."""
    if bool(row.heads) != bool(config.head_dim):
        name = config.timm_name
        raise ModelError(
            f"model.head_dim: {name} has attention heads, whose number grows with width: state head_dim"
            if row.heads
            else f"model.head_dim would do nothing: no argument of {name} is a number of heads; leave it out"
        )
    heads = heads_of(config)
    sizes = (row.width, config.width), (row.depth, config.depth), (row.heads, heads), (row.head_dims, config.head_dim)
    arguments = {key: times(units, size or 1) for part, size in sizes for key, units in part.items() if key}
    arguments |= {"num_classes": config.num_classes, "in_chans": config.in_channels}
    if row.takes_image_size:
        arguments["img_size"] = config.image_size
    if taken := sorted(arguments.keys() & config.arguments.keys()):
        raise ModelError(f"model.arguments: {', '.join(taken)} follows from the model's other keys; leave it out")
    return arguments | config.arguments


def heads_of(config: TimmConfig) -> int:
    return config.width // (config.head_dim or config.width)


@contextmanager
def laid_over(module: Any, arguments: dict[str, Any], change: Callable[[Any], dict[str, Any]]) -> Iterator[None]:
    """Lets `arguments`, and what `change` makes of those that the module's entry points state, win over them, which
    many refuse to be told twice."""
    original = module.build_model_with_cfg

    def build_model(kind: Any, variant: str, pretrained: bool, **stated: Any) -> nn.Module:
        network: nn.Module = original(kind, variant, pretrained, **stated | change(stated) | arguments)
        return network

    module.build_model_with_cfg = build_model
    try:
        yield
    finally:
        module.build_model_with_cfg = original


def build(config: TimmConfig) -> nn.Module:
    """timm's network at this size. Raises ModelError for a name without a row, or arguments that do not fit it."""
    module = architecture_module(config.timm_name)
    row = SIZES[module]
    arguments = size_arguments(config, row)
    import timm

    def change(stated: dict[str, Any]) -> dict[str, Any]:
        return row.change(stated, config.width, config.depth, heads_of(config)) if row.change else {}

    try:
        with laid_over(importlib.import_module(f"timm.models.{module}"), arguments, change):
            network: nn.Module = timm.create_model(config.timm_name)
    except (TypeError, AssertionError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"model: timm cannot build {config.timm_name} with {arguments}: {error}") from error
    return network


def plain_call(config: TimmConfig) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which timm.create_model makes the plain network. Raises ModelError where timm's entry
    point states a size itself, so that no call does."""
    import timm

    arguments = size_arguments(config, SIZES[architecture_module(config.timm_name)])
    with torch.device("meta"):
        wanted = {key: tensor.shape for key, tensor in build(config).state_dict().items()}
        try:
            made = timm.create_model(config.timm_name, **arguments).state_dict()
        except TypeError as error:
            raise ModelError(
                f"cannot export: timm.create_model('{config.timm_name}') takes no size, as its entry point states its "
                f"own ({error})"
            ) from None
    if {key: tensor.shape for key, tensor in made.items()} != wanted:
        raise ModelError(f"cannot export: timm.create_model('{config.timm_name}') ignores the sizes it is given")
    return config.timm_name, arguments


@lru_cache(maxsize=64)
def found_roles(text: str) -> Roles:
    """The roles of the network whose base is the TimmConfig of `text`, in JSON."""
    base = TimmConfig(**json.loads(text))

    def build_at(width: int, depth: int) -> nn.Module:
        return build(replace(base, width=width, depth=depth))

    inputs = torch.zeros(2, base.in_channels, base.image_size, base.image_size)
    found = find_roles(build_at, inputs, base.base_width, base.base_depth)
    if found.head_dim:
        raise ModelError(f"model.timm_name: the head dim of {base.timm_name} grows with width, and no key states it")
    if found.roles.blocks is None:
        raise ModelError(f"model.timm_name: {base.timm_name} adds branches outside of all modules: no block is known")
    return found.roles


def roles(config: TimmConfig) -> Roles:
    """Of the base, by looking; the same at every size."""
    base = replace(config, width=config.base_width, depth=config.base_depth)
    return found_roles(json.dumps(asdict(base), sort_keys=True))


TIMM = Family(name="timm", build=build, roles=roles, finds_roles=True)
