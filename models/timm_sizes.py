"""Which arguments of timm's networks are their width and depth: a row for each architecture module of timm."""

from dataclasses import dataclass, field
from typing import Any

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
}
