"""Which of timm's architecture modules scale as `family: timm`: one small network of each, its roles found by looking,
then a short coordinate check of completep over width and depth.

    python benchmarks/timm_coverage.py docs/timm.md           # writes the table
    python benchmarks/timm_coverage.py --only convnext,eva    # prints the rows of some modules

A run that was ended goes on where it was: rows are kept in runs/timm_coverage.json. Remove it after a change of code.
"""

import argparse
import json
import math
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
import timm
from timm.models import model_entrypoint

from depthmup.models.build import build, build_meta
from depthmup.models.config import TimmConfig
from depthmup.models.coordinate_check import Settings, check
from depthmup.models.discovery.parameters import MORE_BLOCKS
from depthmup.models.errors import ModelError
from depthmup.models.family import ZEROS
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization import Role
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.models.timm_family import TIMM, list_stated_arguments
from depthmup.models.timm_sizes import find_least_width, has_heads

# Modules without residual blocks, as a trace of timm's own networks shows (tests/test_models_timm.py).
NOT_RESIDUAL = dict.fromkeys(("densenet", "inception_v3", "inception_v4", "rdnet", "selecsls"), "concatenates")
NOT_RESIDUAL |= {"vgg": "has no shortcuts"}
NOT_RESIDUAL |= dict.fromkeys(("nasnet", "pnasnet"), "concatenates cells; what is added within them is no stream")
REPRESENTATIVES = {  # where the first name of a module is a special case of it, or needs a larger width
    "beit": "beit_base_patch16_224",
    "byobnet": "gernet_s",
    "nfnet": "nf_resnet26",
    "mobilenetv3": "mobilenetv3_large_075",
    "sknet": "skresnet50",
    "levit": "levit_512",
    "cait": "cait_xxs24_224",
    "convnext": "convnext_atto",
    "deit": "deit3_small_patch16_224",
    "edgenext": "edgenext_small_rw",
    "eva": "eva02_tiny_patch14_224",
    "lowformer": "lowformer_e2",
    "mlp_mixer": "resmlp_12_224",
    "regnet": "regnetx_002",  # groups of 8 channels
    "resnet": "resnet50",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "tnt": "tnt_s_patch16_224",
    "twins": "twins_svt_small",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_small_r26_s32_224",  # its transformer's width is not that of its ResNet
    "vovnet": "ese_vovnet39b",  # with shortcuts
    "xcit": "xcit_nano_12_p16_224",
}
# MLPs 8/3 as wide; squeeze-excitation with a least width
WIDTHS = {"eva": 48, "mambaout": 48, "resnest": 128, "tresnet": 64}
# squeeze-excitation whose channels are rounded to multiples of 8
WIDTHS |= {
    "mobilenetv3": 32,
    "efficientnet": 16,
    "hardcorenas": 32,
    "byobnet": 48,
    "byoanet": 64,
    "cspnet": 64,
    "edgenext": 48,  # a stage's channels in three parts
    "repghost": 64,
}
# whose first stage is 4 times their rule's width; of five; a MLP that is rounded
WIDTHS |= {"mobilenetv5": 4, "hgnet": 80, "tnt": 96}
ARGUMENTS = {
    "cait": {"init_values": 1.0},  # LayerScale: of a branch that is nearly zero a check sees nothing
    "convit": {"local_up_to_layer": 0},
    "deit": {"init_values": 1.0},
    "swiftformer": {"layer_scale_init_value": 1.0},
    "efficientformer": {"num_vit": 99},  # attention in as many blocks of the last stage as there are
    "efficientformer_v2": {"distillation": False, "num_vit": 99, "layer_scale_init_value": 1.0},
    # which lets a block's init depend on its number
    "hiera": {"fix_init": False},
    # nor attention over all of the image in blocks of a fixed number
    "hieradet_sam2": {"fix_init": False, "init_values": 1.0, "global_att_blocks": ()},
    "repvit": {"distillation": False},
    "swin_transformer": {"window_size": 4},
    "swin_transformer_v2": {"window_size": 4},
    "volo": {"use_aux_head": False},
}
# a second block has what the first has not
DEPTHS = {
    "twins": 2,
    "maxxvit": 2,
    "efficientvit_mit": 2,
    "hiera": 2,
    "swiftformer": 2,
    "edgenext": 2,
    "nfnet": 2,
    "hieradet_sam2": 2,
    "repvit": 2,
}
IMAGE_SIZES = {"deepseek_vit": 56, "eva": 56, "efficientformer": 224, "crossvit": 240}
WIDTH, STEP, HEAD_DIM = 32, 16, 16  # of the first stage: at least, and a multiple of; of attention
LEAST_BLOCKS = 4
SETTINGS = Settings(factors=(1, 4), steps=1, num_seeds=4, batch_size=8)
LIMIT = 300  # seconds of CPU for one module


@dataclass(frozen=True)
class Row:
    module: str
    name: str
    result: str  # passes, off, found (and its check not run), refused, fails, not run, not residual
    reason: str = ""


def representative(module: str) -> str:
    names = [name for name in timm.list_models() if model_entrypoint(name).__module__ == f"timm.models.{module}"]
    return REPRESENTATIVES.get(module, names[0])


def small(module: str, name: str) -> TimmConfig:
    """The smallest base: of two blocks a stage where one does not show all that a deeper network has, and of at least
    LEAST_BLOCKS in all, as one block is far from the limit of many."""
    base = sized(module, name, DEPTHS.get(module, 1))
    try:
        TIMM.roles(base)
    except ModelError as error:
        if MORE_BLOCKS not in str(error):
            raise
        base = sized(module, name, 2)
    blocks = len(build_meta(base, ParameterizationConfig()).blocks)
    return base if blocks >= LEAST_BLOCKS else sized(module, name, base.depth * math.ceil(LEAST_BLOCKS / blocks))


def sized(module: str, name: str, depth: int) -> TimmConfig:
    stated = list_stated_arguments(name)
    head_dim = HEAD_DIM if has_heads(stated) else None
    step = math.lcm(find_least_width(stated), STEP)
    width = WIDTHS.get(module, step * math.ceil(WIDTH / step))
    return TimmConfig(
        timm_name=name,
        head_dim=head_dim,
        arguments=dict(ARGUMENTS.get(module, {})),
        image_size=IMAGE_SIZES.get(module, 64),
        num_classes=10,
        **{"width": width, "base_width": width, "depth": depth, "base_depth": depth},
    )


def steps_of(config: TimmConfig) -> int:
    """Behind a readout that starts at zero the first step moves nothing."""
    return 2 if any(rule.role is Role.READOUT and rule.init == ZEROS for rule in TIMM.roles(config).parameters) else 1


class TooSlow(Exception):
    """A module took longer than LIMIT."""


def stop(number: int, frame: Any) -> None:
    raise TooSlow


def examine(module: str) -> Row:
    name = representative(module)
    if module in NOT_RESIDUAL:
        return Row(module, name, "not residual", NOT_RESIDUAL[module])
    base = ParameterizationConfig(name="completep")
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    reached = "not run"
    try:
        config = small(module, name)
        # The paper's absolute form, so that one block a stage is near the limit of many; eps small beside gradients
        # that a LayerScale or a class token makes small (docs/models.md).
        beta = 1 / len(build(config, base, seed=0).blocks)
        reached = "found"
        completep = ParameterizationConfig(name="completep", beta=beta, eps_scaling="table")
        optimizer = OptimizerConfig(name="adamw", lr=1e-3, eps=1e-12)
        settings = replace(SETTINGS, steps=steps_of(config))
        lines = check(config, completep, optimizer, settings)
        if any(line.verdict != "ok" for line in lines):  # of a slope near its bound more seeds decide
            lines = check(config, completep, optimizer, replace(settings, num_seeds=8))
    except ModelError as error:
        return Row(module, name, "refused", str(error))
    except TooSlow:
        return Row(module, name, reached, f"took more than {LIMIT} s of CPU")
    except Exception as error:  # what timm's own forward pass raises: a row of the table as well
        return Row(module, name, "fails", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    wrong = [
        f"{line.axis} {line.quantity} step {line.step}: {line.slope:+.2f}" for line in lines if line.verdict != "ok"
    ]
    return Row(module, name, "off" if wrong else "passes", "; ".join(wrong[:3]))


def page(rows: list[Row]) -> str:
    residual = [row for row in rows if row.result != "not residual"]
    found = sum(row.result in ("passes", "off", "found") for row in residual)
    passing = sum(row.result == "passes" for row in residual)
    table = "\n".join(
        f"| {row.module} | {row.name} | {row.result} | {row.reason.replace('|', ' ')[:160]} |" for row in rows
    )
    return (
        "# timm's architectures as `family: timm`\n\n"
        "Written by `python benchmarks/timm_coverage.py docs/timm.md`: one small network of each of timm's modules,\n"
        "its sizes and roles found by looking, then a coordinate check of completep with AdamW (sizes 1 and 4, one\n"
        "step, or two behind a readout that starts at zero, four seeds, and eight where a slope is not clear), beta =\n"
        "1 / blocks of the base, eps scaled by the table.\n\n"
        f"timm {timm.__version__}: of {len(residual)} modules with residual blocks {found} scale "
        f"({found / len(residual):.0%}), and {passing} of them pass every slope\n"
        f"of the check ({passing / len(residual):.0%}; {passing / len(rows):.0%} of all {len(rows)} modules, of which "
        f"{len(rows) - len(residual)} have no residual blocks).\n"
        "Of those that are `found` the roles are known, and the check has not been run.\n\n"
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
