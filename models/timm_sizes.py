"""Which arguments of timm's networks are their width and depth: a row for each architecture module of timm."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

Arguments = dict[str, Any]
Units = dict[str, Any]  # argument -> number, or one for each stage, that is multiplied by the width, depth or heads


@dataclass(frozen=True)
class SizeArguments:
    """What timm is told at width w, depth d and head dim h: `width` times w, `depth` times d, `heads` times w / h,
    `head_dims` times h."""

    width: Units
    depth: Units
    heads: Units = field(default_factory=dict)
    head_dims: Units = field(default_factory=dict)  # where timm multiplies by the number of heads itself
    takes_image_size: bool = False
    # (what timm's entry point states, width, depth, heads) -> what takes its place: where sizes lie in a configuration
    change: Callable[[Arguments, int, int, int], Arguments] | None = None


def mobile(stated: Arguments, width: int, depth: int, heads: int) -> Arguments:
    """EfficientNets and MobileNets. At width 16 channels are timm's; each stage has `depth` blocks after its first."""

    def scaled(channels: int) -> int:
        return channels * width // 16

    stages = [
        [dict(block) for block in stage[:1] + [{**stage[-1], "stride": 1}] * (depth * (stage[0]["block_type"] != "cn"))]
        for stage in stated["block_args"]
    ]
    changed = {"block_args": stages, "round_chs_fn": scaled, "num_features": scaled(stated.get("num_features", 1280))}
    if isinstance(squeeze := stated.get("se_layer"), partial) and "rd_round_fn" in squeeze.keywords:
        changed["se_layer"] = partial(squeeze, rd_round_fn=round)  # timm's rounds to multiples of 8
    return changed


def own_blocks(stated: Arguments, width: int, depth: int, heads: int) -> Arguments:
    """byobnet's: the blocks of each stage, taken `depth` times, as wide as to give the first stage `width`."""
    config = stated["model_cfg"]

    def as_list(stage: Any) -> tuple[Any, ...]:
        return tuple(stage) if isinstance(stage, tuple | list) else (stage,)

    first = as_list(config.blocks[0])[0].c

    def scaled(channels: Any) -> Any:
        return [scaled(each) for each in channels] if isinstance(channels, tuple | list) else channels * width // first

    blocks = tuple(
        tuple(replace(block, d=1, c=scaled(block.c)) for block in as_list(stage)) * depth for stage in config.blocks
    )
    return {
        "model_cfg": replace(
            config,
            **{"blocks": blocks, "width_factor": 1.0, "stem_chs": scaled(config.stem_chs)},
            num_features=scaled(config.num_features),
        )
    }


def norm_free(stated: Arguments, width: int, depth: int, heads: int) -> Arguments:
    config = stated["model_cfg"]

    def scaled(channels: int | None) -> int | None:
        return channels and channels * width // config.channels[0]

    sizes = {"depths": (depth,) * 4, "channels": tuple(map(scaled, config.channels)), "width_factor": 1.0}
    ends = {"stem_chs": scaled(config.stem_chs), "num_features": scaled(config.num_features)}
    return {"model_cfg": replace(config, **sizes, **ends)}


def multiscale(stated: Arguments, width: int, depth: int, heads: int) -> Arguments:
    sizes = {"embed_dim": times(DOUBLING, width), "num_heads": times(DOUBLING, heads)}
    return {"model_cfg": replace(stated["model_cfg"], depths=(depth,) * 4, **sizes)}


def regular(stated: Arguments, width: int, depth: int, heads: int) -> Arguments:
    """RegNet with stages that double: 8 `depth` blocks, of which about 1/14, 3/14, 5/14 and 5/14 are in each."""
    blocks = 14 * depth
    sizes = {"w0": width, "wm": 2.0, "wa": width * 8 / blocks, "depth": blocks, "stem_width": width}
    return {"model_cfg": replace(stated["model_cfg"], **sizes)}


def cross_stage(stated: Arguments, width: int, depth: int, heads: int) -> Arguments:
    config = stated["model_cfg"]
    first = config.stages.out_chs[0]

    def scaled(channels: Any) -> Any:
        return tuple(map(scaled, channels)) if isinstance(channels, tuple | list) else channels * width // first

    stages = replace(config.stages, out_chs=scaled(config.stages.out_chs), depth=(depth,) * len(config.stages.depth))
    return {"model_cfg": replace(config, stem=replace(config.stem, out_chs=scaled(config.stem.out_chs)), stages=stages)}


def times(units: Any, factor: int) -> Any:
    return tuple(times(unit, factor) for unit in units) if isinstance(units, tuple) else units * factor


DOUBLING, ONE_EACH = (1, 2, 4, 8), (1, 1, 1, 1)
PLAIN_VIT = SizeArguments({"embed_dim": 1}, {"depth": 1}, {"num_heads": 1}, takes_image_size=True)
MIXER = SizeArguments({"embed_dim": 1}, {"num_blocks": 1}, takes_image_size=True)
SWIN = SizeArguments({"embed_dim": 1}, {"depths": ONE_EACH}, {"num_heads": DOUBLING}, takes_image_size=True)
DIMS = SizeArguments({"dims": DOUBLING}, {"depths": ONE_EACH})
RESNET = SizeArguments({"channels": DOUBLING}, {"layers": ONE_EACH})
PYRAMID = SizeArguments({"embed_dims": DOUBLING}, {"depths": ONE_EACH}, {"num_heads": DOUBLING})

SIZES: dict[str, SizeArguments] = {
    "beit": PLAIN_VIT,
    "cait": PLAIN_VIT,
    "convit": SizeArguments({}, {"depth": 1}, {"num_heads": 1}, {"embed_dim": 1}, takes_image_size=True),
    "convmixer": SizeArguments({"dim": 1}, {"depth": 1}),
    "convnext": DIMS,
    "davit": PYRAMID,
    "deit": PLAIN_VIT,
    "efficientvit_mit": SizeArguments({"widths": (1, 2, 4, 8, 16)}, {"depths": (1, 1, 1, 1, 1)}),
    "eva": PLAIN_VIT,
    "focalnet": SizeArguments({"embed_dim": 1}, {"depths": ONE_EACH}),
    "inception_next": DIMS,
    "mambaout": DIMS,
    "metaformer": DIMS,
    "mlp_mixer": MIXER,
    "nest": SizeArguments(
        {"embed_dims": (1, 2, 4)}, {"depths": (1, 1, 1)}, {"num_heads": (1, 2, 4)}, takes_image_size=True
    ),
    "pvt_v2": PYRAMID,
    "resnet": RESNET,
    "resnetv2": SizeArguments({"channels": (4, 8, 16, 32), "stem_chs": 1}, {"layers": ONE_EACH}),
    "sequencer": SizeArguments({"embed_dims": (4, 8, 8, 8), "hidden_sizes": (1, 2, 2, 2)}, {"layers": ONE_EACH}),
    "starnet": SizeArguments({"base_dim": 1}, {"depths": ONE_EACH}),
    "swin_transformer": SWIN,
    "swin_transformer_v2": SWIN,
    "swin_transformer_v2_cr": SWIN,
    "twins": SizeArguments(
        {"embed_dims": DOUBLING}, {"depths": ONE_EACH}, {"num_heads": DOUBLING}, takes_image_size=True
    ),
    "vision_transformer": PLAIN_VIT,
    "vision_transformer_relpos": PLAIN_VIT,
    "vision_transformer_sam": PLAIN_VIT,
    "volo": SizeArguments(
        {"embed_dims": (1, 2, 2, 2)}, {"layers": ONE_EACH}, {"num_heads": (1, 2, 2, 2)}, takes_image_size=True
    ),
    "xcit": PLAIN_VIT,
    "fastvit": SizeArguments({"embed_dims": DOUBLING}, {"layers": ONE_EACH}),
    "repvit": SizeArguments({"embed_dim": DOUBLING}, {"depth": ONE_EACH}),
    "swiftformer": SizeArguments({"embed_dims": DOUBLING}, {"layers": ONE_EACH}),
    "edgenext": SizeArguments({"dims": DOUBLING}, {"depths": ONE_EACH}),
    "efficientformer": SizeArguments({"embed_dims": DOUBLING}, {"depths": ONE_EACH}),
    "efficientformer_v2": SizeArguments({"embed_dims": DOUBLING}, {"depths": ONE_EACH}),
    "fasternet": SizeArguments({"embed_dim": 1}, {"depths": ONE_EACH}),
    "res2net": RESNET,
    "sknet": RESNET,
    "resnest": RESNET,
    "coat": SizeArguments({"embed_dims": DOUBLING}, {"serial_depths": ONE_EACH}),
    "gcvit": SizeArguments({"embed_dim": 1}, {"depths": ONE_EACH}, {"num_heads": DOUBLING}, takes_image_size=True),
    "hiera": SizeArguments({"embed_dim": 1}, {"stages": ONE_EACH}, {"num_heads": 1}, takes_image_size=True),
    "maxxvit": SizeArguments({"embed_dim": DOUBLING, "stem_width": 1}, {"depths": ONE_EACH}, takes_image_size=True),
    "visformer": SizeArguments({"embed_dim": 1, "init_channels": 1}, {"depth": (1, 1, 1)}, takes_image_size=True),
    "pit": SizeArguments(
        {}, {"depth": (1, 1, 1)}, {"heads": (1, 2, 4)}, {"base_dims": (1, 1, 1)}, takes_image_size=True
    ),
    "levit": SizeArguments(
        {"embed_dim": (1, 2, 4)}, {"depth": (1, 1, 1)}, {"num_heads": (1, 2, 4)}, takes_image_size=True
    ),
    "deepseek_vit": PLAIN_VIT,
    "naflexvit": PLAIN_VIT,
    "tresnet": SizeArguments({"width_factor": 1 / 64}, {"layers": ONE_EACH}),
    "gemma4_vit": PLAIN_VIT,
    "qwen3_vit": PLAIN_VIT,
    "tnt": SizeArguments({"embed_dim": 1}, {"depth": 1}, {"num_heads_outer": 1}, takes_image_size=True),
    "tiny_vit": SizeArguments({"embed_dims": DOUBLING}, {"depths": ONE_EACH}, {"num_heads": DOUBLING}),
    "shvit": SizeArguments({"embed_dim": (1, 2, 4)}, {"depth": (1, 1, 1)}),
    "iformer": DIMS,
    "efficientnet": SizeArguments({}, {}, change=mobile),
    "mobilenetv3": SizeArguments({}, {}, change=mobile),
    "hardcorenas": SizeArguments({}, {}, change=mobile),
    "byobnet": SizeArguments({}, {}, change=own_blocks),
    "byoanet": SizeArguments({}, {}, change=own_blocks),
    "mobilevit": SizeArguments({}, {}, change=own_blocks),
    "nfnet": SizeArguments({}, {}, change=norm_free),
    "mvitv2": SizeArguments({}, {}, {"": 1}, takes_image_size=True, change=multiscale),
    "regnet": SizeArguments({}, {}, change=regular),
    "cspnet": SizeArguments({}, {}, change=cross_stage),
    "cspnext": SizeArguments({"channels": DOUBLING}, {"depths": ONE_EACH}),
    "rexnet": SizeArguments({"width_mult": 1 / 16}, {"depth_mult": 1}),
}
