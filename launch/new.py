"""`depthmup new`: a commented study to start from, fitted to the images that it will train on."""

import re
from pathlib import Path
from typing import Any

import jinja2

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.look import look_at_images
from depthmup.data.paths import protect
from depthmup.data.sources import PACKAGED
from depthmup.launch.config import folder_name
from depthmup.launch.paths import command
from depthmup.launch.reading import study_in
from depthmup.train.yaml_text import load_yaml

SIDES = (224, 128, 64, 32, 16, 8)  # pixels of the square that a proxy sees
PATCHES = 8  # of a ViT along a side, where that gives patches of 2 to 16 pixels
IMAGENET = "[0.485, 0.456, 0.406]", "[0.229, 0.224, 0.225]"  # mean and std that most recipes take for photographs
BATCH, STEPS, EPOCHS = 64, 300, 10  # of each run: the longer of STEPS and EPOCHS, but at most MOST_STEPS
MOST_STEPS = 2000

# What a small proxy of each family is, as keys of the file.
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {
        "network": "Vision Transformer",
        "sizes": [(64, 3), (64, 12), (256, 3)],
        "model": {"head_dim": 16, "class_token": "false", "global_pool": "avg"},
        "optimizer": {"name": "adamw", "lr": "2**-8", "weight_decay": "1e-4"},
        "first": "2**-13",
        "last": "2**-4",
    },
    "conv_resnet": {
        "network": "ResNet of the paper, without normalisation,",
        "sizes": [(32, 3), (32, 12), (128, 3)],
        "model": {},
        "optimizer": {"name": "sgd", "lr": "2**-4", "momentum": 0.9},
        "first": "2**-10",
        "last": "2**0",
    },
    "resnet": {
        "network": "timm ResNet",
        "sizes": [(32, 4), (32, 16), (128, 4)],
        "model": {"block": "basic", "norm": "batch"},
        "optimizer": {"name": "sgd", "lr": "2**-3", "momentum": 0.9},
        "first": "2**-10",
        "last": "2**1",
    },
}


def describe_study(name: str, file: Path, family: str, source: str) -> str:
    """The text of a study of `family` on the images of `source`, fitted to them. Raises UserError."""
    look = look_at_images(source)
    pixels = next((side for side in SIDES if side <= look.pixels), SIDES[-1])
    steps = min(max(STEPS, EPOCHS * look.images // BATCH), MOST_STEPS)
    row = FAMILIES[family]
    model = {**row["model"], **({"patch_size": min(max(pixels // PATCHES, 2), 16)} if family == "vit" else {})}
    mean, std = IMAGENET if look.has_colours else (0.5, 0.5)
    images = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.rpartition(":")[2]).name.split(".")[0]).strip("-.") or name
    where = source if source in PACKAGED else protect(str(Path(source).resolve()))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("depthmup.launch", "."),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("new.yaml.j2").render(
        {**row, "model": model},
        name=name,
        file=file,
        family=family,
        source=None if look.is_indexed else where,
        images=images,
        root=where if look.is_indexed else f"shards/{images}",
        look=look,
        pixels=pixels,
        mean=mean,
        std=std,
        batch=BATCH,
        samples=steps * BATCH,
    )


def write_new_study(name: str, family: str, source: str) -> list[str]:
    """Writes NAME.yaml into the working folder, and returns the lines that say what comes next. Raises UserError."""
    file = Path(f"{name}.yaml")
    try:
        folder_name(name)
    except ValueError as error:
        raise UserError(f"{name}: a study's name {error}") from None
    if file.exists():
        raise UserError(f"{file} exists already: give another name, or delete it first")
    text = describe_study(name, file, family, source)
    study_in(load_yaml(text, str(file)), file)  # what is written is a study that can be launched
    write_atomically(file, text.encode())
    return [f"{file} is written. Next:", "", *(f"  {command(verb, file)}" for verb in ("plan", "transfer"))]
