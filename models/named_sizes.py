"""Networks that have a name of their own, as keys of a model's configuration."""

from typing import Any

from depthmup.models.errors import ModelError

VIT_16 = {"family": "vit", "head_dim": 64, "patch_size": 16, "image_size": 224}
RESNET_BOTTLENECK = {"family": "resnet", "block": "bottleneck", "width": 64, "image_size": 224}
NAMED_SIZES: dict[str, dict[str, Any]] = {
    "vit_s16": VIT_16 | {"width": 384, "depth": 12},
    "vit_b16": VIT_16 | {"width": 768, "depth": 12},
    "vit_l16": VIT_16 | {"width": 1024, "depth": 24},
    "resnet50": RESNET_BOTTLENECK | {"blocks": [3, 4, 6, 3], "depth": 16},
    "resnet101": RESNET_BOTTLENECK | {"blocks": [3, 4, 23, 3], "depth": 33},
    "resnet152": RESNET_BOTTLENECK | {"blocks": [3, 8, 36, 3], "depth": 50},
}


def expand_named_size(raw: Any) -> Any:
    """Replaces the key `named` by the keys of that row of NAMED_SIZES; keys that are stated beside it win."""
    if not isinstance(raw, dict) or "named" not in raw:
        return raw
    stated = {key: value for key, value in raw.items() if key != "named"}
    if raw["named"] not in NAMED_SIZES:
        raise ModelError(f"unknown named size {raw['named']!r}; known: {', '.join(NAMED_SIZES)}")
    return NAMED_SIZES[raw["named"]] | stated
