"""Which of timm's architecture modules scale as `family: timm`: one small network of each, its roles found by looking,
then a short coordinate check of completep over width and depth.

    python benchmarks/timm_coverage.py docs/timm.md           # writes the table
    python benchmarks/timm_coverage.py --only convnext,eva    # prints the rows of some modules

A run that was ended goes on where it was: rows are kept in runs/timm_coverage.json. Remove it after a change of code.
"""

import argparse
import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
import timm
from timm.models import model_entrypoint

from depthmup.models.build import build
from depthmup.models.config import ParameterizationConfig, TimmConfig
from depthmup.models.coordinate_check import Settings, check
from depthmup.models.errors import ModelError
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.timm_sizes import SIZES

# Their blocks concatenate, or add cells of which none is the stream.
NOT_RESIDUAL = {"densenet", "inception_v3", "inception_v4", "nasnet", "pnasnet", "rdnet", "selecsls", "vgg"}
REPRESENTATIVES = {  # where the first name of a module is a special case of it
    "beit": "beit_base_patch16_224",
    "byobnet": "gernet_s",
    "nfnet": "nf_resnet26",
    "levit": "levit_conv_128s",
    "cait": "cait_xxs24_224",
    "convnext": "convnext_atto",
    "deit": "deit3_small_patch16_224",
    "eva": "eva02_tiny_patch14_224",
    "mlp_mixer": "resmlp_12_224",
    "resnet": "resnet50",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "twins": "twins_svt_small",
    "vision_transformer": "vit_tiny_patch16_224",
    "xcit": "xcit_nano_12_p16_224",
}
# MLPs 8/3 as wide
WIDTHS = {"eva": 48, "mambaout": 48, "sknet": 64, "resnest": 128, "tresnet": 64}
# SE layers whose channels are rounded to multiples of 8
WIDTHS |= {"mobilenetv3": 32, "efficientnet": 32, "hardcorenas": 32, "byobnet": 48, "byoanet": 64, "cspnet": 64}
ARGUMENTS = {
    "cait": {"init_values": 1.0},  # LayerScale: of a branch that is nearly zero a check sees nothing
    "convit": {"local_up_to_layer": 0},
    "deit": {"init_values": 1.0},
    "hiera": {"fix_init": False},  # which lets a block's init depend on its number
    "repvit": {"distillation": False},
    "swin_transformer": {"window_size": 4},
    "swin_transformer_v2": {"window_size": 4},
}
# a second block has what the first has not
DEPTHS = {"twins": 2, "maxxvit": 2, "efficientvit_mit": 2, "hiera": 2, "swiftformer": 2, "edgenext": 2, "nfnet": 2}
IMAGE_SIZES = {"deepseek_vit": 56, "eva": 56}
SETTINGS = Settings(factors=(1, 4), steps=1, num_seeds=4)


@dataclass(frozen=True)
class Row:
    module: str
    name: str
    result: str  # passes, off, refused, no row, not residual
    reason: str = ""


def representative(module: str) -> str:
    names = [name for name in timm.list_models() if model_entrypoint(name).__module__ == f"timm.models.{module}"]
    return REPRESENTATIVES.get(module, names[0])


def small(module: str, name: str) -> TimmConfig:
    depth, width = DEPTHS.get(module, 1), WIDTHS.get(module, 32)
    return TimmConfig(
        timm_name=name,
        head_dim=16 if SIZES[module].heads else None,
        arguments=dict(ARGUMENTS.get(module, {})),
        image_size=IMAGE_SIZES.get(module, 64),
        num_classes=10,
        **{"width": width, "base_width": width, "depth": depth, "base_depth": depth},
    )


def examine(module: str) -> Row:
    name = representative(module)
    if module in NOT_RESIDUAL:
        return Row(module, name, "not residual")
    if module not in SIZES:
        return Row(module, name, "no row", "its entry points have no row in models/timm_sizes.py")
    config, base = small(module, name), ParameterizationConfig(name="completep")
    try:
        # The paper's absolute form, so that one block a stage is near the limit of many; eps small beside gradients
        # that a LayerScale or a class token makes small (docs/models.md).
        beta = 1 / len(build(config, base, seed=0).blocks)
        completep = ParameterizationConfig(name="completep", beta=beta, eps_scaling="table")
        optimizer = OptimizerConfig(name="adamw", lr=1e-3, eps=1e-12)
        lines = check(config, completep, optimizer, SETTINGS)
        if any(line.verdict != "ok" for line in lines):  # of a slope near its bound more seeds decide
            lines = check(config, completep, optimizer, replace(SETTINGS, num_seeds=8))
    except ModelError as error:
        return Row(module, name, "refused", str(error))
    except Exception as error:  # what timm's own forward pass raises: a row of the table as well
        return Row(module, name, "fails", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    wrong = [
        f"{line.axis} {line.quantity} step {line.step}: {line.slope:+.2f}" for line in lines if line.verdict != "ok"
    ]
    return Row(module, name, "off" if wrong else "passes", "; ".join(wrong[:3]))


def page(rows: list[Row]) -> str:
    residual = [row for row in rows if row.result != "not residual"]
    found = sum(row.result in ("passes", "off") for row in residual)
    passing = sum(row.result == "passes" for row in residual)
    table = "\n".join(
        f"| {row.module} | {row.name} | {row.result} | {row.reason.replace('|', ' ')[:160]} |" for row in rows
    )
    return (
        "# timm's architectures as `family: timm`\n\n"
        "Written by `python benchmarks/timm_coverage.py docs/timm.md`: one small network of each of timm's modules,\n"
        "its roles found by looking, then a coordinate check of completep with AdamW (sizes 1 and 4, one step, four\n"
        "seeds, and eight where a slope is not clear), beta = 1 / blocks of the base, eps scaled by the table.\n\n"
        f"timm {timm.__version__}: of {len(residual)} modules with residual blocks {found} scale, and {passing} "
        f"of them pass every slope of the check.\n\n"
        f"| module | network | result | why |\n|---|---|---|---|\n{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", help="the page to write")
    parser.add_argument("--only", help="modules, with commas between them")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="timm")
    modules = sorted({model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()})
    kept = Path("runs/timm_coverage.json")
    known = json.loads(kept.read_text()) if given.page and kept.exists() else {}
    rows = []
    for module in given.only.split(",") if given.only else modules:
        start = time.perf_counter()
        rows.append(row := Row(**known[module]) if module in known else examine(module))
        print(
            f"{module} ({row.name}): {row.result} {row.reason[:400]}  [{time.perf_counter() - start:.0f} s]", flush=True
        )
        if given.page:
            known[module] = asdict(row)
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(known, indent=1))
            given.page.write_text(page(rows))
    if not given.page:
        sys.stdout.write(page(rows))


if __name__ == "__main__":
    main()
