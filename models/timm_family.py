"""Any of timm's networks whose width and depth are arguments (models.timm_sizes), with roles found by looking."""

import difflib
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from depthmup.models.config import TimmConfig
from depthmup.models.errors import ModelError
from depthmup.models.found_family import make_found_family
from depthmup.models.timm_sizes import Wanted, find_sizes, has_heads, read_signature


def load_timm() -> Any:
    """The package, which is slow to import: for those who use it."""
    import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
    import timm

    return timm


def find_architecture_module(name: str) -> str:
    """timm's module of the network called `name`. Raises ModelError for a name that timm lacks."""
    timm = load_timm()
    if "." in name or not timm.is_model(name):
        nearest = ", ".join(difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3, cutoff=0))
        what = "has a tag of weights, which are not loaded" if "." in name else "is unknown to timm"
        raise ModelError(f"model.timm_name: {name!r} {what}; nearest: {nearest}")
    return str(timm.models.model_entrypoint(name).__module__).rpartition(".")[2]


def find_size_arguments(config: TimmConfig, stated: dict[str, Any]) -> dict[str, Any]:
    """What timm is told of the network's size, classes and images, beside what its class and entry point state.

    Raises ModelError for keys that do not fit.
    """
    name = config.timm_name
    if has_heads(stated) != bool(config.head_dim):
        raise ModelError(
            f"model.head_dim: {name} has attention heads, whose number grows with width: state head_dim"
            if has_heads(stated)
            else f"model.head_dim would do nothing: no argument of {name} is a number of heads; leave it out"
        )
    wanted = Wanted(config.width, config.depth, config.head_dim)
    try:
        arguments = find_sizes(find_architecture_module(name), stated, wanted)
    except ModelError as error:
        raise ModelError(f"model.timm_name: {name} at width {config.width} and depth {config.depth}: {error}") from None
    arguments |= {"num_classes": config.num_classes, "in_chans": config.in_channels}
    if "img_size" in stated:
        arguments["img_size"] = config.image_size
    if taken := sorted(arguments.keys() & config.arguments.keys()):
        raise ModelError(f"model.arguments: {', '.join(taken)} follows from the model's other keys; leave it out")
    return arguments | config.arguments


@contextmanager
def building(name: str, build_model: Callable[..., nn.Module]) -> Iterator[None]:
    """Lets timm's entry point of `name` call build_model(original, kind, variant, pretrained, **stated) in the place of
    timm's build_model_with_cfg, `original`, which many entry points tell sizes that no caller can change."""
    module: Any = importlib.import_module(f"timm.models.{find_architecture_module(name)}")
    original = module.build_model_with_cfg
    module.build_model_with_cfg = partial(build_model, original)
    try:
        yield
    finally:
        module.build_model_with_cfg = original


class Stated(Exception):
    """What the class and the entry point of a network state."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def list_stated_arguments(name: str) -> dict[str, Any]:
    """Of the network called `name`: the arguments of its class with their defaults, and those of its entry point."""
    timm = load_timm()

    def stop(original: Any, kind: Any, variant: str, pretrained: bool, **stated: Any) -> nn.Module:
        raise Stated(read_signature(kind) | stated)

    try:
        with building(name, stop):
            timm.create_model(name)
    except Stated as found:
        return found.arguments
    raise ModelError(f"model.timm_name: timm does not build {name} as it builds its other networks")


def build(config: TimmConfig) -> nn.Module:
    """timm's network at this size. Raises ModelError for one without arguments for it, or that has no such size."""
    arguments: dict[str, Any] = {}

    def build_model(original: Any, kind: Any, variant: str, pretrained: bool, **stated: Any) -> nn.Module:
        arguments.update(find_size_arguments(config, read_signature(kind) | stated))
        network: nn.Module = original(kind, variant, pretrained, **stated | arguments)
        return network

    name = config.timm_name
    with building(name, build_model):
        try:
            network: nn.Module = load_timm().create_model(name)
        except ModelError:
            raise
        except (TypeError, AssertionError, ValueError, IndexError, KeyError, ArithmeticError) as error:
            raise ModelError(f"model: timm cannot build {name} with {arguments}: {error}") from error
    return network


def find_plain_call(config: TimmConfig) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which timm.create_model makes the plain network. Raises ModelError where timm's entry
    point states a size itself, so that no call does."""
    timm = load_timm()
    arguments = find_size_arguments(config, list_stated_arguments(config.timm_name))
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


TIMM = make_found_family("timm", TimmConfig, build)
