"""Folds every multiplier into weights, so that the plain network without hooks computes the same function."""

import torch
from torch import Tensor, nn

from depthmup.models.build import ScaledModel, find_slots
from depthmup.models.errors import ModelError
from depthmup.models.family import Slot

# Exactly these, not subclasses: a weight-standardised conv undoes any scale of its weight.
FOLDABLE = ("Linear", "Conv1d", "Conv2d", "BatchNorm2d", "GroupNorm", "LayerNorm", "RmsNorm", "RMSNorm")
GROUPED = "depthmup.models.moe_vit", "GroupedLinear"


def is_foldable(module: nn.Module) -> bool:
    """Whether the module's output is linear in (weight, bias)."""
    place, kind = type(module).__module__, type(module).__name__
    known = (place.startswith(("torch.nn.", "timm.layers.")) and kind in FOLDABLE) or (place, kind) == GROUPED
    return known and isinstance(module.weight, Tensor)


def fold_output(state: dict[str, Tensor], network: nn.Module, name: str, slot: Slot, value: float) -> None:
    """Multiplies what ends in module `name` by `value`. Raises ModelError where no weight could do that."""
    own = is_foldable(network.get_submodule(name))
    target, share = (name, 1.0) if own else (slot.last_before(name), slot.share)
    module = network.get_submodule(target)
    if not is_foldable(module):
        raise ModelError(
            f"cannot export: the multiplier {value:g} of {name} has no weight to go into; {target} is a "
            f"{type(module).__name__} whose output does not scale with a weight"
        )
    for tensor in (state.get(f"{target}.weight"), state.get(f"{target}.bias")):
        if tensor is not None:
            tensor[: round(len(tensor) * share)] *= value


@torch.no_grad()
def folded_state(scaled: ScaledModel) -> dict[str, Tensor]:
    """The network's state dict with branch, attention and readout multipliers (gamma0 included) in the weights.

    Raises ModelError that names the module where a fold is impossible, such as a norm without gain at a branch's end.
    """
    network, roles = scaled.network, scaled.roles
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    slots = find_slots(network, (*roles.branches, *roles.queries, *roles.distributions))
    for name, multiplier in scaled.multipliers.items():
        if name in roles.readouts:
            readout = network.get_submodule(name)
            if not is_foldable(readout):
                raise ModelError(f"cannot export: the readout {name} is a {type(readout).__name__} without a weight")
            state[f"{name}.weight"] *= multiplier.value  # the readout's input is scaled, so not its bias
        else:
            fold_output(state, network, name, slots[name], multiplier.value)
    return state
