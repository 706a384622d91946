"""Initial weights as a pure function of (seed, parameter name): the same for every world size, wrapping and device."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from depthmup.models.errors import ModelError
from depthmup.models.family import ParameterRule, compute_base_shape
from depthmup.models.parameterization import Scale


def make_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose state depends on nothing but `seed` and `name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def init_std(shape: torch.Size, rule: ParameterRule, scale: Scale) -> float:
    """The base model's standard deviation times sqrt(init variance factor). Raises ModelError where there is no fan."""
    at_base = compute_base_shape(shape, rule.role, scale.width_ratio)
    if "fan" in rule.init.kind and (len(shape) < 2 or 0 in at_base):
        raise ModelError(
            f"{rule.pattern}: a {rule.role.value} of shape {tuple(shape)} has no fan at base size, which Init "
            f"{rule.init.kind} needs: give it another role, or Init normal or constant"
        )
    base_std = rule.init.base_std(at_base)
    return base_std * math.sqrt(scale.init_variance(rule.role))


def draw(name: str, shape: torch.Size, rule: ParameterRule, scale: Scale, seed: int) -> Tensor:
    """Initial value of one parameter, float32 on the CPU: noise of `init_std`, or a constant."""
    if rule.init.kind == "constant":
        return torch.full(shape, rule.init.scale)
    std = init_std(shape, rule, scale)
    generator = make_generator(seed, name)
    if rule.init.kind.startswith("uniform"):
        noise = torch.rand(shape, generator=generator)
        return (
            noise.mul_(2).sub_(1).mul_(math.sqrt(3) * std)
        )  # in place: one tensor at a time; std of U(-b, b) is b / sqrt(3)
    return torch.randn(shape, generator=generator).mul_(std)


def keep_whole(value: Tensor, parameter: Tensor) -> Tensor:
    return value


@torch.no_grad()
def initialize(
    model: nn.Module,
    rules: dict[str, ParameterRule],
    scale: Scale,
    seed: int,
    spread: Callable[[Tensor, Tensor], Tensor] = keep_whole,
    device: torch.device | str | None = None,
    take: Callable[[nn.Module], object] | None = None,
) -> None:
    """Fills every parameter of `model` in place and resets running statistics, module by module, the inner ones first.

    `rules`: parameter name -> its rule; `spread`: (value on the CPU, parameter) -> the value as it is to be copied
    there, where parameters are sharded; `device`: of a model on meta, where each module is moved before it is filled;
    `take`: is given each module with parameters of its own once these are filled, and may put others in their place.
    Raises RuntimeError when a parameter or buffer is NaN afterwards, which means that nothing initialised it.
    """
    for prefix, module in reversed(list(model.named_modules())):
        if device is not None:
            materialize(module, device)
        own = list(module.named_parameters(prefix, recurse=False))
        for name, parameter in own:
            if name in rules:
                parameter.copy_(spread(draw(name, parameter.shape, rules[name], scale, seed), parameter))
        reset = getattr(module, "reset_running_stats", None)  # of BatchNorm and of a mixture of experts
        if callable(reset):
            reset()
        tensors = (*own, *module.named_buffers(prefix, recurse=False))
        if forgotten := [name for name, tensor in tensors if torch.isnan(tensor).any()]:
            raise RuntimeError(f"no initialiser filled {', '.join(forgotten)}")
        if take and own:
            take(module)


def materialize(module: nn.Module, device: torch.device | str) -> None:
    """Moves the module's own tensors from meta to `device`, filled with NaN so that a forgotten initialiser cannot pass
    unseen; buffers that are on no meta device keep what is in them."""
    buffers = dict(module.named_buffers(recurse=False))
    kept = {name: buffer.to(device) for name, buffer in buffers.items() if not buffer.is_meta}
    module.to_empty(device=device, recurse=False)
    with torch.no_grad():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
    for name, buffer in kept.items():
        setattr(module, name, buffer)
