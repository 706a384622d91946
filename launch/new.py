"""`depthmup new`: a commented study to start from, fitted to the images that it will train on and to its target."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from depthmup.data.config import DataConfig
from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.index import show_count
from depthmup.data.look import Look, look_at_images
from depthmup.data.minival import count_held_out
from depthmup.data.order import fit_batch
from depthmup.data.pack import count_validation_images
from depthmup.data.paths import protect
from depthmup.data.sources import PACKAGED
from depthmup.launch.config import Size, check_folder_name
from depthmup.launch.new_network import describe_proxy, find_side
from depthmup.launch.path_cost import PathCost, count_path
from depthmup.launch.paths import quote_command
from depthmup.launch.reading import parse_study
from depthmup.launch.wording import show_share
from depthmup.train.reading import from_plain, set_dotted
from depthmup.train.yaml_text import load_yaml

IMAGENET = "[0.485, 0.456, 0.406]", "[0.229, 0.224, 0.225]"  # mean and std that most recipes take for photographs
BATCH, STEPS, EPOCHS = 64, 300, 10  # of each run: the longer of STEPS and EPOCHS, but at most MOST_STEPS
HELD_OUT = 0.1  # of the images for val, and of the others for minival
MOST_STEPS = 2000
SHARE = 0.01  # of a target's FLOPs, that tuning may cost where nothing else is said
FEWEST_STEPS = 150  # of a run whose optimum is to be told; the demo's runs have as many
TARGET_EPOCHS = 90  # of a target that states no samples
DECAYS = 0.05, 2.0  # what the steps of a run take off the weights, in logarithms: little, and most
LONGER = 4  # times the samples of the others: a size that measures how the optimum moves with them


@dataclass(frozen=True)
class NewStudy:
    """The text of a study's file; with a target, the text of its file and what tuning costs beside it."""

    text: str
    target: str = ""
    cost: PathCost | None = None


def choose_sizes(base: Size, target: Size | None) -> list[Size]:
    """The base, wider and deeper ones, which cost less than the target. Raises UserError when that is too small."""
    factors = (2, 4) if target else (4,)  # a forecast needs three sizes along an axis
    wider = [replace(base, width=factor * base.width) for factor in factors]
    deeper = [replace(base, depth=factor * base.depth) for factor in factors]
    if target is None:
        return [base, *deeper, *wider]
    sizes = [base, *(size for size in deeper if size.depth < target.depth)]
    sizes += [size for size in wider if size.width < target.width]
    if target.width < base.width or target.depth < base.depth or len(sizes) == 1:
        raise UserError(
            f"--target {target}: the proxy has {base}, and a study over sizes needs one between the two: give a target "
            "more than twice as wide or as deep"
        )
    return sizes


def read_size(option: str, text: str) -> Size:
    """'width=768,depth=24', after which a target may say samples=1e8,batch=1024. Raises UserError."""
    changes: dict[str, Any] = {}
    for part in text.split(","):
        if "=" not in part:
            more = ",samples=1e8,batch=1024" if option == "--target" else ""
            raise UserError(f"{option} {text}: it looks like width=768,depth=24{more}")
        if (name := part.partition("=")[0].strip()) in changes:
            raise UserError(f"{option} {text}: {name} is given twice: keep one of them")
        set_dotted(changes, part)
    size = from_plain(Size, changes, f"{option} {text}")
    if size.num_experts:
        raise UserError(f"{option} {text}: num_experts would do nothing: no network of a new study has experts")
    if option == "--base" and (size.samples or size.batch):
        raise UserError(f"{option} {text}: samples and batch are the study's own: give width and depth alone")
    return size


def count_training_images(source: str, look: Look) -> int:
    """Those of `source` that the study does not hold out. Raises UserError where it would hold out none."""
    has_own_splits = look.is_indexed or look.has_validation
    validation = 0 if has_own_splits else count_validation_images(look.images, HELD_OUT)
    minival = int(count_held_out(look.images - validation, HELD_OUT))
    if not minival or not (validation or has_own_splits):
        raise UserError(
            f"{source}: a study tunes on images that are held out, and a share of {HELD_OUT:g} of "
            f"{show_count(look.images, 'image')} is none: give more images"
        )
    return look.images - validation - minival


def choose_batch(target: Size | None, images: int) -> int:
    """The target's, or BATCH where there are as many `images` to train on. Raises UserError."""
    if not target or not target.batch:
        return min(BATCH, fit_batch(images))
    if target.batch > images:
        raise UserError(
            f"--target {target}: its batch of {target.batch} is more than the {images} images to train on: give "
            f"batch={fit_batch(images)}, or more images"
        )
    return target.batch


class Template:
    """What a study of `network` on the images of `source` says, but for its samples. Raises UserError."""

    def __init__(
        self, name: str, file: Path, network: str, source: str, target: Size | None, base: Size | None = None
    ) -> None:
        look = look_at_images(source)
        proxy = describe_proxy(network, look, base)
        pixels = proxy.pixels or find_side(look)
        mean, std = IMAGENET if look.has_colours else (0.5, 0.5)
        images = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.rpartition(":")[2]).name.split(".")[0]).strip("-.")
        where = source if source in PACKAGED else protect(str(Path(source).resolve()))
        self.name, self.file, self.num_images = name, file, look.images
        self.batch = choose_batch(target, count_training_images(source, look))
        self.target = target and replace(
            target, batch=self.batch, samples=target.samples or TARGET_EPOCHS * look.images // self.batch * self.batch
        )
        self.values: dict[str, Any] = {
            **vars(proxy),
            **{"name": name, "file": file, "target": self.target},
            **{"target_file": locate_target_file(name), "look": look, "pixels": pixels, "mean": mean, "std": std},
            "sizes": choose_sizes(proxy.base, target),
            "channels": proxy.channels or look.channels,
            "source": None if look.is_indexed else where,
            "images": images or name,
            "root": where if look.is_indexed else f"shards/{images or name}",
            "batch": self.batch,
            "streams": math.gcd(DataConfig.num_streams, self.batch),
            "usual_streams": DataConfig.num_streams,
            "held_out": HELD_OUT,
        }

    def render(self, steps: int, longer: bool = False) -> str:
        """`longer`: with a size of LONGER times the samples."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("depthmup.launch", "."),
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
        )
        samples = steps * self.batch
        decay, most_decay = (f"{share / steps:.0e}" for share in DECAYS)
        return environment.get_template("new.yaml.j2").render(
            self.values,
            samples=samples,
            longest=LONGER * samples if longer else None,
            decay=decay,
            most_decay=most_decay,
        )

    def render_target(self) -> str:
        """The target's own keys."""
        size = self.target
        assert size
        return (
            f"# The target of the study {self.name}: what differs from the proxy in {self.file}.\n"
            f"model: {{width: {size.width}, depth: {size.depth}}}\n"
            f"train: {{samples: {size.samples}}}\n"
        )

    def count(self, text: str) -> PathCost:
        """What the path that `text` begins costs."""
        changes = load_yaml(self.render_target(), locate_target_file(self.name).name)
        return count_path(self.file, parse_study(load_yaml(text, str(self.file)), self.file), changes)


def locate_target_file(name: str) -> Path:
    return Path(f"{name}_target.yaml")


def describe_study(
    name: str,
    file: Path,
    network: str,
    source: str,
    target: Size | None = None,
    share: float = SHARE,
    base: Size | None = None,
) -> NewStudy:
    """A study of `network` on the images of `source`. With a `target` its runs are as long as `share` of the target's
    FLOPs pays for, at most as long as the target's. Raises UserError, also where that is too short to tell an optimum.
    """
    template = Template(name, file, network, source, target, base)
    if not template.target:
        return NewStudy(template.render(min(max(STEPS, EPOCHS * template.num_images // template.batch), MOST_STEPS)))
    assert template.target.samples
    most = template.target.samples // template.batch
    for longer in (True, False):
        # FLOPs are proportional to the steps.
        cost = template.count(template.render(FEWEST_STEPS, longer))
        steps = min(math.floor(FEWEST_STEPS * share / cost.share), most)
        if LONGER * steps <= most:
            break
    if steps < FEWEST_STEPS:
        raise UserError(
            f"--target {target}: {show_share(share)} of its FLOPs pays for runs of {steps} steps, and an optimum needs "
            f"{FEWEST_STEPS}: add --share {math.ceil(1000 * cost.share) / 1000:g}, or give the target more samples"
        )
    times = steps / FEWEST_STEPS
    cost = replace(cost, search=times * cost.search, study=times * cost.study)
    return NewStudy(template.render(steps, longer), template.render_target(), cost)


def write_new_study(
    name: str, network: str, source: str, target: str | None = None, share: float = SHARE, base: str | None = None
) -> list[str]:
    """Writes NAME.yaml into the working folder, and NAME_target.yaml where a `target` is given. network: as
    `describe_proxy` takes it; target, base: as `read_size` does. Returns the lines that say what comes next. Raises
    UserError."""
    file = Path(f"{name}.yaml")
    try:
        check_folder_name(name)
    except ValueError as error:
        raise UserError(f"{name}: a study's name {error}") from None
    if target is None and share != SHARE:
        raise UserError(f"--share {share:g} would do nothing without a target: add --target")
    for each in (file, *([locate_target_file(name)] if target is not None else [])):
        if each.exists():
            raise UserError(f"{each} exists already: give another name, or delete it first")
    of_target = None if target is None else read_size("--target", target)
    of_base = None if base is None else read_size("--base", base)
    found = describe_study(name, file, network, source, of_target, share, of_base)
    parse_study(load_yaml(found.text, str(file)), file)  # what is written is a study that can be launched
    write_atomically(file, found.text.encode())
    if not found.cost:
        return [f"{file} is written. Next:", "", *(f"  {quote_command(verb, file)}" for verb in ("plan", "transfer"))]
    write_atomically(locate_target_file(name), found.target.encode())
    words = (file, "--target", locate_target_file(name))
    next_commands = (quote_command("plan", *words), quote_command("transfer", file, "--tune", *words[1:]))
    return [
        f"{file} and {locate_target_file(name)} are written. {found.cost}",
        "Next:",
        "",
        *(f"  {each}" for each in next_commands),
    ]
