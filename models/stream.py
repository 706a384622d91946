"""Where a network puts out its residual stream."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from depthmup.models.build import ScaledModel
from depthmup.models.errors import ModelError
from depthmup.models.multiplier import change_output


def look_once(network: nn.Module, inputs: Tensor, handles: Sequence[RemovableHandle]) -> None:
    """One forward pass that changes nothing, for the hooks of `handles`, which are removed after it."""
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(inputs)  # running statistics stay as they are
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()


def find_stream_modules(scaled: ScaledModel, inputs: Tensor) -> list[str]:
    """The residual blocks: those that `roles` states, or the innermost modules around branches that still put
    something out where all branches are zero. That is the stream; what lies further inside is a part of a branch.

    Raises ModelError for a branch that the network itself adds to the stream, outside of every module.
    """
    if scaled.blocks:
        return list(scaled.blocks)
    around = {end: [end[:i] for i in range(len(end) - 1, 0, -1) if end[i] == "."] for end in scaled.branches}
    modules, carries = dict(scaled.network.named_modules()), set[str]()

    def silence(module: nn.Module, inputs: Any, output: Any) -> Any:
        return change_output(output, torch.zeros_like)

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.any():
                carries.add(name)

        return hook

    handles = [modules[end].register_forward_hook(silence) for end in around]
    handles += [
        modules[name].register_forward_hook(look(name)) for name in {n for names in around.values() for n in names}
    ]
    look_once(scaled.network, inputs, handles)
    blocks = {end: next((name for name in names if name in carries), None) for end, names in around.items()}
    if outside := [end for end, block in blocks.items() if block is None]:
        raise ModelError(
            f"no module around {outside[0]} puts out the residual stream, which the check watches: put the sum of "
            "stream and branch into a module"
        )
    return list(dict.fromkeys(block for block in blocks.values() if block))
