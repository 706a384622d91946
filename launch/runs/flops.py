"""Parameters and FLOPs by formula, where they are simple: torch, which counts the others, takes seconds to import."""

import re

from depthmup.models.config import AnyModelConfig, ConvResNetConfig, VisionTransformerConfig

PLAIN_VIT = re.compile(r"(vit|deit)_(tiny|small|base|large)_patch(?P<patch_size>\d+)_\d+")


def count_by_formula(model: AnyModelConfig) -> tuple[int, int] | None:
    """(parameters, FLOPs of one image forward, a multiply-add being 2), or None where there is no formula."""
    if isinstance(model, ConvResNetConfig):
        return count_conv_resnet(model)
    if type(model) is VisionTransformerConfig and (name := PLAIN_VIT.fullmatch(model.timm_name)):
        return count_vision_transformer(model, model.patch_size or int(name["patch_size"]))
    return None


def count_conv_resnet(model: ConvResNetConfig) -> tuple[int, int]:
    width, convs = model.width, model.depth * model.convs_per_branch
    norm = 0 if model.norm == "none" else 2 * width
    stem, conv, readout = 9 * model.in_channels * width, 9 * width**2, width * model.num_classes
    sides = [model.image_size // 2**stage for stage in range(model.num_stages)]  # halved between stages
    positions = sum(side**2 for side in sides) / model.num_stages  # of a conv, the mean over equally long stages
    parameters = stem + convs * (conv + norm) + readout + model.num_classes
    return parameters, round(2 * (stem * model.image_size**2 + convs * conv * positions + readout))


def count_vision_transformer(model: VisionTransformerConfig, patch_size: int) -> tuple[int, int]:
    """timm's plain ViT: patch embedding, blocks of attention and MLP with norms before them, norm, readout."""
    width, hidden = model.width, int(model.width * (model.mlp_ratio or 4))
    patches = (model.image_size // patch_size) ** 2
    tokens = patches + (model.class_token is not False)
    embedding, readout = model.in_channels * patch_size**2 * width, width * model.num_classes
    matrices = 4 * width**2 + 2 * width * hidden  # qkv and proj, fc1 and fc2
    biases_and_norms = 4 * width + width + hidden + 4 * width
    biases_and_norms += 2 * width * bool(model.layer_scale)
    biases_and_norms += 4 * model.heads(width)[1] * bool(model.qk_norm)
    outside = embedding + width + (tokens - patches) * width + tokens * width + 2 * width + readout + model.num_classes
    attention = 2 * tokens**2 * width  # logits, and the weighted sum of values
    multiplications = embedding * patches + model.depth * (matrices * tokens + attention) + readout
    return outside + model.depth * (matrices + biases_and_norms), 2 * multiplications
