"""The network of a new study: what a small proxy of each kind is, as keys of the study's file."""

import math
from dataclasses import dataclass, replace
from typing import Any, Final

from depthmup.data.errors import UserError
from depthmup.data.look import Look
from depthmup.launch.config import Size
from depthmup.models.config import OwnConfig, TimmConfig
from depthmup.models.errors import ModelError
from depthmup.train.reading import insert_code

SIDES = (8, 16, 32, 64, 128, 224)  # pixels of the square that a proxy sees
PATCHES = 8  # of a ViT along a side, where that gives patches of 2 to 16 pixels


@dataclass(frozen=True)
class Proxy:
    """A network's smallest size, and what the file says of it. preset: what published studies of its kind say."""

    title: str
    base: Size
    model: dict[str, Any]  # beside its size, classes and images
    preset: str
    optimizer: dict[str, Any]
    first: str  # of the rates that are searched
    last: str
    pixels: int = 0  # of an image's side; 0: as the images have them
    channels: int = 0  # likewise


ADAMW: dict[str, Any] = {"optimizer": {"name": "adamw", "lr": "2**-8"}, "first": "2**-13", "last": "2**-4"}
PROXIES = {
    "vit": Proxy(
        "Vision Transformer",
        Size(width=64, depth=3),
        {"family": "vit", "head_dim": 16, "class_token": "false", "global_pool": "avg"},
        "auto",
        **ADAMW,
    ),
    "conv_resnet": Proxy(
        "ResNet of the paper, without normalisation,",
        Size(width=32, depth=3),
        {"family": "conv_resnet"},
        "auto",
        {"name": "sgd", "lr": "2**-4", "momentum": 0.9},
        "2**-10",
        "2**0",
    ),
    "resnet": Proxy(
        "timm ResNet",
        Size(width=32, depth=4),
        {"family": "resnet", "block": "basic", "norm": "batch"},
        "depth_mup",
        {"name": "sgd", "lr": "2**-3", "momentum": 0.9},
        "2**-10",
        "2**1",
    ),
}
FOUND: Final = "completep"  # of networks whose roles are found by looking: most have several layers in a branch
HEAD_DIM = 16  # of a network of timm's that has attention
LEAST_WIDTH = 32  # of the first stage of a network of timm's
OWN_BASE = Size(width=64, depth=3)  # of a network of the user's own, where none is given


def find_side(look: Look) -> int:
    """The largest of SIDES that the images have."""
    return max((side for side in SIDES if side <= look.pixels), default=SIDES[0])


def describe_proxy(network: str, look: Look, base: Size | None) -> Proxy:
    """The proxy of `network`, a name of PROXIES or of timm's, or FILE.py:FUNCTION, for the images of `look`. base: its
    size, where that is given. Raises UserError, also for a network whose roles are not found."""
    if network in PROXIES:
        row = PROXIES[network]
        patch = {"patch_size": min(max(find_side(look) // PATCHES, 2), 16)} if network == "vit" else {}
        return replace(row, base=base or row.base, model={**row.model, **patch})
    try:
        return describe_own(network, look, base or OWN_BASE) if ":" in network else describe_timm(network, look, base)
    except ModelError as error:
        known = "" if ":" in network else f". Beside timm's names there are {', '.join(PROXIES)} and FILE.py:FUNCTION"
        raise UserError(f"--network {network}: {error}{known}") from None


def describe_shape(look: Look, size: Size) -> dict[str, Any]:
    """What a configuration of the proxy states beside its kind."""
    width, depth = {"width": size.width, "base_width": size.width}, {"depth": size.depth, "base_depth": size.depth}
    return {**width, **depth, "num_classes": look.classes}


def describe_own(network: str, look: Look, base: Size) -> Proxy:
    """Of FILE.py:FUNCTION. A builder that takes no in_channels sees colours. Raises ModelError, UserError."""
    from depthmup.models.own import list_builder_arguments

    model = {"family": "own", "builder": network}
    given = insert_code({"model": {**model, **describe_shape(look, base), "image_size": find_side(look)}}, "--network")[
        "model"
    ]
    config = OwnConfig(**given)
    channels = look.channels if "in_channels" in list_builder_arguments(config) else 3
    preset = choose_absolute_form(replace(config, in_channels=channels))
    return Proxy(config.builder, base, model, preset, **ADAMW, channels=channels)


def choose_absolute_form(base: OwnConfig | TimmConfig) -> str:
    """The preset in which branches are divided by the number of the network's blocks, not of the base's: where a base
    has several blocks to a unit of depth, beta = 1 is far from the limit. Raises ModelError, as where roles are not
    found."""
    from depthmup.models.build import count_blocks
    from depthmup.models.parameterization_config import ParameterizationConfig

    blocks = count_blocks(base, ParameterizationConfig(name=FOUND))
    return f"{{name: {FOUND}, beta: {1 / blocks:.3g}}}" if blocks > 1 else FOUND


def describe_timm(name: str, look: Look, base: Size | None) -> Proxy:
    """Of timm's network `name`: of two blocks a stage where one does not show all that a deeper network has, and of
    larger images where it shrinks those of `look` to nothing. Raises ModelError."""
    from depthmup.models.timm_family import list_stated_arguments
    from depthmup.models.timm_sizes import find_least_width, has_heads

    stated = list_stated_arguments(name)
    step = math.lcm(find_least_width(stated), HEAD_DIM)
    width = step * math.ceil(LEAST_WIDTH / step)
    model: dict[str, Any] = {"family": "timm", "timm_name": name}
    model |= {"head_dim": HEAD_DIM} if has_heads(stated) else {}
    sizes = [base] if base else [Size(width=width, depth=1), Size(width=width, depth=2)]
    problem: ModelError | None = None
    for pixels in SIDES[SIDES.index(find_side(look)) :][:4]:
        for size in sizes:
            shape = describe_shape(look, size) | {"image_size": pixels, "in_channels": look.channels}
            try:
                preset = choose_absolute_form(TimmConfig(**model, **shape))
            except ModelError as error:
                problem = error
            else:
                return Proxy(name, size, model, preset, **ADAMW, pixels=pixels)
    assert problem
    raise problem
