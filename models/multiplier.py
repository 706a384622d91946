"""Forward multipliers, put on the modules of a network that stays otherwise as its library built it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Multiplier:
    """A Python float that multiplies a tensor. `value` is read at each call, so a caller may change it."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Multiplier({self.value:g})"


def change_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with `change` made to it; of several outputs, as those of torch's attention, to the first."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


class OutputMultiplier(Multiplier):
    """Forward hook: the module's output times `value`."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return change_output(output, lambda tensor: tensor * self.value)


class InputMultiplier(Multiplier):
    """Forward pre-hook: the module's first input times `value`."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * self.value, *inputs[1:])


def scale_output(model: nn.Module, name: str, value: float) -> OutputMultiplier | None:
    """Multiplies the output of module `name` by `value`; nothing is installed for 1. A hook keeps every parameter's
    name and works on a module of any class, also on timm's empty slots (`ls1`, `drop_path`, `q_norm`)."""
    if value == 1.0:
        return None
    multiplier = OutputMultiplier(value)
    model.get_submodule(name).register_forward_hook(multiplier)
    return multiplier


def scale_input(model: nn.Module, name: str, value: float) -> InputMultiplier | None:
    """Multiplies the first input of module `name` by `value`; nothing is installed for 1."""
    if value == 1.0:
        return None
    multiplier = InputMultiplier(value)
    model.get_submodule(name).register_forward_pre_hook(multiplier)
    return multiplier


def is_scaled(model: nn.Module) -> bool:
    """Whether a multiplier is installed on any module."""
    return any(
        isinstance(hook, Multiplier)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
