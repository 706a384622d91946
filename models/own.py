"""A network of one's own in a study: the function of a configuration's code that builds it."""

import inspect
import linecache
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from depthmup.models.config import OwnConfig
from depthmup.models.discovery.growth import build_network
from depthmup.models.errors import ModelError
from depthmup.models.found_family import make_found_family
from depthmup.models.source_code import fingerprint_source

SHAPE = ("num_classes", "image_size", "in_channels")  # that a builder may take, beside width and depth


def say_error(error: BaseException, file: str) -> str:
    """What went wrong in the code called `file`, in one line, with the last of its lines that was reached."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f" (line {lines[-1]})" if lines else ""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}{place}"


@lru_cache(maxsize=16)
def load_code(code: str) -> ModuleType:
    """The module that `code` makes: registered, and with its lines, as dataclasses, torch.compile and tracebacks ask
    for. Raises ModelError."""
    name = f"depthmup_own_{fingerprint_source(code)}"
    module = ModuleType(name)
    module.__file__ = file = f"<model.code {name}>"
    linecache.cache[file] = len(code), None, code.splitlines(keepends=True), file
    sys.modules[name] = module
    try:
        exec(compile(code, file, "exec"), module.__dict__)
    except ImportError as error:
        raise ModelError(
            f"model.builder: {error}: a run has the one file with it, which can import what is installed: put the rest "
            "into the file, or install it as a package"
        ) from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"model.builder: {say_error(error, file)}") from error
    return module


def list_builder_arguments(config: OwnConfig) -> dict[str, Any]:
    """What the builder is given beside width and depth: of SHAPE what it has arguments for."""
    parameters = inspect.signature(find_builder(config)).parameters.values()
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    names = {each.name for each in parameters}
    return {key: getattr(config, key) for key in SHAPE if takes_all or key in names}


def find_builder(config: OwnConfig) -> Callable[..., nn.Module]:
    """Raises ModelError for what is no function of (width, depth)."""
    found = getattr(load_code(config.code), config.builder, None)
    if not callable(found):
        raise ModelError(f"model.builder: {config.builder} is no function (width, depth) on the top level of its file")
    builder: Callable[..., nn.Module] = found
    return builder


def build(config: OwnConfig) -> nn.Module:
    """The builder's network at this size. Raises ModelError for one that it cannot build, with the line."""
    builder = find_builder(config)
    arguments = list_builder_arguments(config)
    try:
        inspect.signature(builder).bind(config.width, config.depth, **arguments)
    except TypeError as error:
        raise ModelError(f"model.builder: {config.builder} must take (width, depth), two numbers: {error}") from None
    try:
        network = builder(config.width, config.depth, **arguments)
    except (Exception, SystemExit) as error:
        if isinstance(error, RuntimeError | NotImplementedError) and torch.get_default_device().type == "meta":
            raise  # what asks a meta tensor for its numbers is built elsewhere: see discovery.growth.build_network
        said = say_error(error, str(load_code(config.code).__file__))
        raise ModelError(f"model.builder: {config.builder}({config.width}, {config.depth}): {said}") from error
    return network


def check_logits(base: OwnConfig) -> None:
    """Raises ModelError where the network does not give a row of `num_classes` logits for each image."""
    shape = (2, base.in_channels, base.image_size, base.image_size)
    network = build_network(lambda width, depth: build(base), base.width, base.depth, "cpu").eval()
    try:
        with torch.no_grad():
            logits = network(torch.zeros(shape))
    except (Exception, SystemExit) as error:
        said = say_error(error, str(load_code(base.code).__file__))
        raise ModelError(f"model.builder: its network fails on images of shape {shape}: {said}") from error
    wanted = (2, base.num_classes)
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != wanted:
        given = f"some of shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(
            f"model.builder: for 2 images its network must give logits of shape {wanted}, as model.num_classes says, "
            f"and gives {given}"
        )


OWN = make_found_family("own", OwnConfig, build, check_logits)
