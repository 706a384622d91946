"""Which arguments of timm's networks are their width and depth.

They are found by name: in the signature of the network's class, in what timm's entry point states, and in the
configuration objects among that. RULES has what names do not tell. At the width that timm's entry point states, all
channels are timm's; every stage gets `depth` blocks.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

from depthmup.models.errors import ModelError

Arguments = dict[str, Any]

# The first of these that a network has gives its width: the channels of its first stage.
WIDTHS = (
    *("embed_dim", "embed_dims", "dims", "dim", "base_dim", "channels", "widths", "width_list", "num_channels"),
    *("out_chs", "stage_out_chs"),
)
# They grow with it.
WITH_WIDTH = (
    *("stem_width", "stem_chs", "stem_hidden_dim", "init_channels", "stage_conv_chs", "partial_dim", "inner_dim"),
    *("hidden_sizes", "intermediate_size", "head_widths", "head_hidden_size", "num_features", "neck_chans"),
)
DEPTHS = (
    *("depth", "depths", "layers", "num_blocks", "stages", "serial_depths", "transformer_depths", "depth_list"),
    "block_per_stage",
)
HEADS = ("num_heads", "heads", "num_heads_outer", "num_heads_inner")
HEAD_DIMS = ("head_dim", "key_dim")  # beside a number of heads
CONFIGURATIONS = ("model_cfg", "cfg")  # arguments that hold others


@dataclass(frozen=True)
class Wanted:
    """Sizes as the configuration has them. head_dim: None where it states none."""

    width: int
    depth: int
    head_dim: int | None

    @property
    def heads(self) -> int:
        return self.width // (self.head_dim or self.width)


# ---------------------------------------------------------------- by name


def read_signature(kind: type) -> Arguments:
    """The arguments of a network's class with their defaults; its parents' as well, where it passes them on."""
    found: Arguments = {}
    for each in inspect.getmro(kind):
        if "__init__" in vars(each):
            parameters = inspect.signature(each.__init__).parameters.values()  # type: ignore[misc]
            found = {each.name: each.default for each in parameters} | found
            if not any(each.kind is each.VAR_KEYWORD for each in parameters):
                break
    return found


def is_size(value: Any) -> bool:
    """A whole number, or a sequence of these, one a stage, which may be nested."""
    if isinstance(value, tuple | list):
        return bool(value) and all(map(is_size, value))
    return isinstance(value, int) and not isinstance(value, bool)


def is_configuration(name: str, value: Any, inside: bool) -> bool:
    return (inside or name in CONFIGURATIONS) and (dataclasses.is_dataclass(value) or isinstance(value, dict))


def list_items(arguments: Any) -> Iterator[tuple[str, Any]]:
    yield from arguments.items() if isinstance(arguments, dict) else vars(arguments).items()


def walk_sizes(arguments: Any, inside: bool = False) -> Iterator[tuple[str, Any]]:
    """(name, value) of the sizes among the arguments, and among those in configurations."""
    for name, value in list_items(arguments):
        if is_size(value):
            yield name, value
        elif is_configuration(name, value, inside):
            yield from walk_sizes(value, inside=True)


def take_first(value: Any) -> int:
    """Of a size, or of the first stage's."""
    number: int = take_first(value[0]) if isinstance(value, tuple | list) else value
    return number


def find_size(arguments: Arguments, names: tuple[str, ...]) -> int | None:
    """The size that has the first of `names` which is there."""
    sizes = dict(reversed(list(walk_sizes(arguments))))  # of one name, the first
    return next((take_first(sizes[name]) for name in names if name in sizes), None)


def list_numbers(value: Any) -> list[int]:
    """All that are in a size."""
    return [number for each in value for number in list_numbers(each)] if isinstance(value, tuple | list) else [value]


def change_numbers(value: Any, change: Callable[[int], int]) -> Any:
    """`change` of every number of a size, in sequences of the same type."""
    return (
        type(value)(change_numbers(each, change) for each in value)
        if isinstance(value, tuple | list)
        else change(value)
    )


def constant(value: int, number: int) -> int:
    return value


def scale_value(ratio: Fraction, name: str, value: Any) -> Any:
    """`value` times `ratio`. Raises ModelError where that is no whole number."""

    def number(each: int) -> int:
        if (each * ratio).denominator > 1:
            raise ModelError(
                f"{name} {each} times {ratio} is no whole number: take a width that is a larger multiple of 2"
            )
        return int(each * ratio)

    return change_numbers(value, number)


def scale_by_name(arguments: Any, wanted: Wanted, ratios: dict[str, Fraction], inside: bool = False) -> Arguments:
    """Those of the arguments that change with size, changed. ratios: of each name, what its sizes are multiplied by."""
    changed: Arguments = {}
    for name, value in list_items(arguments):
        if is_configuration(name, value, inside):
            new = scale_by_name(value, wanted, ratios, inside=True)
            changed[name] = value | new if isinstance(value, dict) else replace(value, **new)
        elif not is_size(value):
            continue
        elif name in ratios:
            changed[name] = scale_value(ratios[name], name, value)
        elif name in DEPTHS:
            changed[name] = change_numbers(value, lambda blocks: wanted.depth if blocks else 0)
        elif name in HEAD_DIMS and wanted.head_dim:
            changed[name] = change_numbers(value, partial(constant, wanted.head_dim))
    return changed


def scale_named_sizes(stated: Arguments, wanted: Wanted) -> Arguments:
    """Width, depth and number of heads go into the arguments that have their names. Raises ModelError."""
    width, heads = find_size(stated, WIDTHS), find_size(stated, HEADS)
    if width is None or find_size(stated, DEPTHS) is None:
        what = "width" if width is None else "depth"
        raise ModelError(f"no argument of its class is a {what}, by any name in models/timm_sizes.py")
    ratios = dict.fromkeys((*WIDTHS, *WITH_WIDTH), Fraction(wanted.width, width))
    if heads:
        ratios |= dict.fromkeys(HEADS, Fraction(wanted.heads, heads))
    return scale_by_name(stated, wanted, ratios)


# ---------------------------------------------------------------- what names do not tell


def mobile(stated: Arguments, wanted: Wanted) -> Arguments:
    """EfficientNets and MobileNets. At width 16 channels are timm's; each stage has `depth` blocks after its first."""

    def channels(number: int) -> int:
        return number * wanted.width // 16

    stages = [
        [
            dict(block)
            for block in stage[:1] + [{**stage[-1], "stride": 1}] * (wanted.depth * (stage[0]["block_type"] != "cn"))
        ]
        for stage in stated["block_args"]
    ]
    changed = {"block_args": stages, "round_chs_fn": channels, "num_features": channels(stated["num_features"])}
    if isinstance(squeeze := stated.get("se_layer"), partial) and "rd_round_fn" in squeeze.keywords:
        changed["se_layer"] = partial(squeeze, rd_round_fn=round)  # timm's rounds to multiples of 8
    return changed


def own_blocks(stated: Arguments, wanted: Wanted) -> Arguments:
    """byobnet's: the blocks of each stage, taken `depth` times, as wide as to give the first stage `width`. Where some
    hold transformers, as in mobilevit, these alone have `depth` blocks: the others lie between them."""
    config = stated["model_cfg"]

    def as_list(stage: Any) -> tuple[Any, ...]:
        return tuple(stage) if isinstance(stage, tuple | list) else (stage,)

    start = as_list(config.blocks[0])[0].c

    def channels(of: Any) -> Any:
        return change_numbers(of, lambda number: number * wanted.width // start) if is_size(of) else of

    stages = list(map(as_list, config.blocks))
    holders = any("transformer_depth" in (block.block_kwargs or {}) for stage in stages for block in stage)
    inner_sizes: dict[str, Callable[[Any], Any]] = {
        "transformer_dim": channels,
        "transformer_depth": lambda blocks: wanted.depth,
    }

    def find_block(block: Any) -> Any:
        inner = {
            key: inner_sizes[key](of) if key in inner_sizes else of for key, of in (block.block_kwargs or {}).items()
        }
        return replace(block, d=block.d if holders else 1, c=channels(block.c), block_kwargs=inner or None)

    blocks = tuple(tuple(map(find_block, stage)) * (1 if holders else wanted.depth) for stage in stages)
    sizes = {"blocks": blocks, "width_factor": 1.0, "stem_chs": channels(config.stem_chs)}
    return {"model_cfg": replace(config, **sizes, num_features=channels(config.num_features))}


def regular(stated: Arguments, wanted: Wanted) -> Arguments:
    """RegNet with stages that double: 14 `depth` blocks, of which about 1/14, 3/14, 5/14 and 5/14 are in each."""
    blocks, width = 14 * wanted.depth, wanted.width
    sizes = {"w0": width, "wm": 2.0, "wa": width * 8 / blocks, "depth": blocks, "stem_width": width}
    return {"model_cfg": replace(stated["model_cfg"], **sizes)}


def ghost(stated: Arguments, wanted: Wanted) -> Arguments:
    """At width 16 channels are timm's; each stage has `depth` blocks after its first."""
    stages = [stage[:1] + [[*stage[-1][:-1], 1]] * wanted.depth for stage in stated["cfgs"]]
    return {"width": wanted.width / 16, "cfgs": stages}


def gpu_net(stated: Arguments, wanted: Wanted) -> Arguments:
    """A stage is [channels in, within, out, blocks, ...]."""
    config = stated["model_cfg"]
    ratio = Fraction(wanted.width, config["stage1"][0])
    stages = {
        name: [*scale_value(ratio, name, stage[:3]), wanted.depth, *stage[4:]]
        for name, stage in config.items()
        if name.startswith("stage")
    }
    return {"model_cfg": config | stages | {"stem_chs": scale_value(ratio, "stem_chs", config["stem_chs"])}}


def xception(stated: Arguments, wanted: Wanted) -> Arguments:
    """The width is what the first block puts out; its stem has 64 channels at any. `depth` blocks follow each of the
    blocks that shrink the image. The last block has a shortcut here, so that every block has a branch of one kind."""
    blocks, ratio = stated["block_cfg"], Fraction(wanted.width, take_first(stated["block_cfg"][0]["out_chs"]))
    made: list[Arguments] = []
    for block in (each for each in blocks if each["stride"] > 1 or each.get("no_skip")):
        before = take_first(made[-1]["out_chs"][-1]) if made else block["in_chs"]
        outs = scale_value(ratio, "out_chs", block["out_chs"])
        outs = (outs,) * 3 if isinstance(outs, int) else outs
        made.append(block | {"in_chs": before, "out_chs": outs, "no_skip": False})
        if not block.get("no_skip"):
            made += [
                {"in_chs": made[-1]["out_chs"][-1], "out_chs": (made[-1]["out_chs"][-1],) * 3, "stride": 1}
                for _ in range(wanted.depth)
            ]
    return {"block_cfg": made}


def of_heads(width: str, heads: str) -> Callable[[Arguments, Wanted], Arguments]:
    """For networks whose argument `width` is one head's, which timm multiplies by their number."""

    def sizes(stated: Arguments, wanted: Wanted) -> Arguments:
        assert wanted.head_dim
        ratios = {
            width: Fraction(wanted.head_dim, take_first(stated[width])),
            heads: Fraction(wanted.heads, take_first(stated[heads])),
        }
        return scale_by_name(stated, wanted, ratios)

    return sizes


def attention_groups(stated: Arguments, wanted: Wanted) -> Arguments:
    """iFormer's groups of three blocks, of which stages with attention consist."""
    groups = change_numbers(stated["attn_groups"], lambda count: wanted.depth if count else 0)
    depths = tuple(3 * wanted.depth if count else wanted.depth for count in groups)
    return scale_named_sizes(stated, wanted) | {"attn_groups": groups, "depths": depths}


def floating(width: str, at: int) -> Callable[[Arguments, Wanted], Arguments]:
    """For networks whose width is a factor, 1 at `at` channels."""

    def sizes(stated: Arguments, wanted: Wanted) -> Arguments:
        ratios = dict.fromkeys(WITH_WIDTH, Fraction(wanted.width, at))
        return {width: wanted.width / at} | scale_by_name(stated, wanted, ratios)

    return sizes


def last_stage(stated: Arguments, wanted: Wanted) -> Arguments:
    """LCNet's: at width 64 channels are timm's. The last stage alone has shortcuts, and so it alone grows in depth."""
    sizes = floating("scale", 64)(stated, wanted)
    return sizes | {"depths": (*stated["depths"][:-1], wanted.depth)}


# Module of timm -> (what the class and the entry point state, wanted sizes) -> arguments that change
RULES: dict[str, Callable[[Arguments, Wanted], Arguments]] = {
    **dict.fromkeys(("efficientnet", "mobilenetv3", "mobilenetv5", "hardcorenas"), mobile),
    **dict.fromkeys(("byobnet", "byoanet", "mobilevit"), own_blocks),
    **dict.fromkeys(("ghostnet", "repghost"), ghost),
    "convit": of_heads("embed_dim", "num_heads"),
    "hgnet": gpu_net,
    "iformer": attention_groups,
    "lcnetv2": last_stage,
    "pit": of_heads("base_dims", "heads"),
    "regnet": regular,
    "tresnet": floating("width_factor", 64),
    "xception_aligned": xception,
}


def has_heads(stated: Arguments) -> bool:
    """Whether a number of attention heads, which grows with the width, is among the arguments."""
    return find_size(stated, HEADS) is not None


def find_sizes(module: str, stated: Arguments, wanted: Wanted) -> Arguments:
    """Which arguments of timm's network change with its size, and to what.

    stated: those of its class with their defaults, and of its entry point. Raises ModelError for a network without
    arguments that state its size, and for one that has no such width.
    """
    return RULES.get(module, scale_named_sizes)(stated, wanted)


def find_least_width(stated: Arguments) -> int:
    """The smallest width at which every size that is found by name is a whole number."""
    width = find_size(stated, WIDTHS)
    if width is None:
        return 1
    sizes = [value for name, value in walk_sizes(stated) if name in (*WIDTHS, *WITH_WIDTH)]
    return math.lcm(*(Fraction(number, width).denominator for size in sizes for number in list_numbers(size)))
