"""The data's configuration. Nothing here imports torch."""

import re
from dataclasses import field, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, PlainSerializer, Tag
from pydantic.dataclasses import dataclass

from depthmup.data.paths import expand_read, protect
from depthmup.data.storage import BLOCK, is_remote

OTHER_DECODER = "use data.backend=fast (other pixels: another run)"
NOT_IDENTITY = {"identity": False}  # on a field that does not change a result: no part of a run's hash


def refuse_switch(value: Any) -> Any:
    """YAML reads on, yes and true as True, which Python takes for the number 1."""
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


Whole = Annotated[int, BeforeValidator(refuse_switch)]
Positive = Annotated[Whole, Field(gt=0)]
Real = Annotated[float, BeforeValidator(refuse_switch), Field(allow_inf_nan=False)]
Mean = Annotated[Real, Field(ge=0, le=1)]
Std = Annotated[Real, Field(gt=0)]
Value = TypeVar("Value")
PerChannel = Annotated[  # one number for all channels, or one each; messages leave out tags in angle brackets
    Annotated[Value, Tag("<number>")] | Annotated[tuple[Value, ...], Field(min_length=1), Tag("<list>")],
    Discriminator(lambda given: "<list>" if isinstance(given, list | tuple) else "<number>"),
]
Window = Annotated[
    Annotated[Positive, Tag("<number>")] | Annotated[Literal["epoch"], Tag("<word>")],
    Discriminator(lambda given: "<word>" if isinstance(given, str) else "<number>"),
]
# A path. It is written back so that it reads as the same path in any environment.
PathText = Annotated[str, AfterValidator(expand_read), PlainSerializer(protect)]
RAND_AUGMENT = re.compile(  # what timm's parser understands; what it does not, it ignores or asserts
    r"rand(-(m\d+|n[1-9]\d*|p(0\.\d*[1-9]\d*|1(\.0+)?)|mstd\d+(\.\d+)?|mmax[1-9]\d*|inc[01]|t(weights|3aw|3a)))*"
)


def find_channel_misfit(config: "DataConfig", channels: int) -> str | None:
    """What is wrong where `mean` or `std` has not one number for each channel of the images; None where they fit."""
    for name in ("mean", "std"):
        value = getattr(config, name)
        if isinstance(value, tuple) and len(value) != channels:
            return f"data.{name} has {len(value)} numbers, but images have {channels} channel(s) (model.in_channels)"
    return None


def simplify_channels(config: "DataConfig") -> "DataConfig":
    """`config` with one number where `mean` or `std` has the same one for each channel: it is the same run."""
    given = {name: getattr(config, name) for name in ("mean", "std")}
    alike = {name: value[0] for name, value in given.items() if isinstance(value, tuple) and len(set(value)) == 1}
    return replace(config, **alike) if alike else config


def expand_per_channel(value: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One number for each channel."""
    return value if isinstance(value, tuple) else (value,) * channels


def find_stream_misfit(num_streams: int, global_batch_size: int) -> str | None:
    """What is wrong where `num_streams` does not divide the batch, and what would do; None where it divides."""
    if global_batch_size % num_streams == 0:
        return None
    lower = global_batch_size // num_streams * num_streams
    nearest = f"{lower} or {lower + num_streams}" if lower else f"{num_streams}"
    return (
        f"data.num_streams {num_streams} must divide train.global_batch_size {global_batch_size}: "
        f"use train.global_batch_size={nearest}, or another data.num_streams"
    )


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class DataConfig:
    """`name` says which data set it is and belongs to a run's identity; where its files lie does not."""

    name: str  # the same name is taken for the same images, wherever they lie
    root: PathText = field(metadata=NOT_IDENTITY)  # folder of shards with index.json
    source: PathText | None = field(default=None, metadata=NOT_IDENTITY)  # packed into root when root has no index
    validation_share: Annotated[Real, Field(ge=0, lt=1)] = 0.0  # of the source, when it has no split of its own
    minival: Annotated[Real, Field(ge=0, lt=1)] = 0.01  # share of each class of train, held out for tuning
    # crop_flip: shifted by up to an eighth; resized_crop_flip: a part of random size and shape, as for ImageNet
    augment: Literal["none", "crop_flip", "resized_crop_flip"] = "none"
    rand_augment: str | None = None  # timm's description, such as rand-m9-mstd0.5
    color_jitter: Annotated[Real, Field(gt=0, le=1)] | None = None  # brightness, contrast, saturation: 1 - x to 1 + x
    mixup: Annotated[Real, Field(gt=0)] | None = None  # alpha of the shares' beta distribution
    cutmix: Annotated[Real, Field(gt=0)] | None = None  # likewise; with both, each step takes one of them
    mean: PerChannel[Mean] = 0.5  # pixel values scaled to [0, 1], then (x - mean) / std; one number or one each
    std: PerChannel[Std] = 0.5  # as mean
    num_streams: Positive = 64  # parts of the data that are read side by side; divides the global batch size
    # Samples shuffled together inside a stream, or the whole epoch, which reads each sample by itself.
    window: Window = 64
    # pil is the reference that the others are compared with; nvjpeg decodes on the GPU. Each has pixels of its own.
    backend: Literal["fast", "pil", "nvjpeg"] = "fast"
    max_bad_fraction: Annotated[Real, Field(ge=0, le=1)] = field(default=0.001, metadata=NOT_IDENTITY)  # of an epoch
    trust: bool = field(default=False, metadata=NOT_IDENTITY)  # lets an index name files outside its own folder
    in_memory: bool = field(default=False, metadata=NOT_IDENTITY)  # decode once, keep the pixels: for small data sets
    num_workers: Annotated[Whole, Field(ge=0)] = field(default=0, metadata=NOT_IDENTITY)  # 0: the trainer decodes

    def __post_init__(self) -> None:
        if self.rand_augment is not None and not RAND_AUGMENT.fullmatch(self.rand_augment):
            raise ValueError(
                f"rand_augment {self.rand_augment!r} is none of timm's: write it like rand-m9-mstd0.5-inc1 "
                "(sections m, n, p, mstd, mmax, inc, t)"
            )
        for key in ("rand_augment", "color_jitter", "in_memory"):
            if self.backend == "nvjpeg" and getattr(self, key):
                raise ValueError(
                    f"backend nvjpeg does not go with {key}, which needs pixels on the CPU: {OTHER_DECODER}"
                )


def find_window_misfit(config: DataConfig, location: str) -> str | None:
    """What is wrong where a shuffled epoch would be read from a shard (or a folder of them) over the network."""
    if config.window != "epoch" or config.in_memory or not is_remote(location):
        return None
    return (
        f"{location}: data.window=epoch reads each sample by itself, from a remote shard a block of {BLOCK >> 20} MiB "
        "each: copy the shards to a local disk, or set data.window to a number"
    )
