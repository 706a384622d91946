"""timm can be imported beside any torchvision: each kind is a small package that does at its import what that one does.

Each is tried in a process of its own, forked from one that has imported torch.
"""

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from depthmup.models.build import build
from depthmup.models.config import VisionTransformerConfig
from depthmup.models.parameterization_config import ParameterizationConfig

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
NEEDS_OPERATORS = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}", lambda dets, scores, iou_threshold: dets.new_empty(0))
"""
TORCHVISIONS = {
    "operators of its own, in a library of any name": f"""
import torch
LIBRARY = torch.library.Library("torchvision", "DEF")
LIBRARY.define("nms{SCHEMA}")
LIBRARY.define("qnms{SCHEMA}")
{NEEDS_OPERATORS}
""",
    "a library that does not load": NEEDS_OPERATORS,
    "another failure": "raise RuntimeError('compiled with different CUDA major versions')",
    "a module missing": "import no_such_module",
    "not installed": None,
}
PROBE = """
import json, os, sys, traceback
import torch
import depthmup.train.loop
from depthmup.models.build import build
from depthmup.models.config import ConvResNetConfig
from depthmup.models.parameterization_config import ParameterizationConfig

build(ConvResNetConfig(width=8, depth=3, base_width=8, base_depth=3), ParameterizationConfig(), seed=0)
assert "torchvision" not in sys.modules, "a network that is not timm's needs no torchvision"

def outcome(folder):
    sys.path.insert(0, folder)
    if not os.listdir(folder):
        sys.modules["torchvision"] = None
    try:
        from depthmup.models.torchvision_ops import OPERATORS
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    import torchvision
    assert torchvision.__file__.startswith(folder) and hasattr(torch.ops.torchvision, "qnms")
    return "defined" if OPERATORS else "left alone"

for folder in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            print(json.dumps(outcome(folder)), flush=True)
        except BaseException:
            print(json.dumps(traceback.format_exc()), flush=True)
        os._exit(0)
    if status := os.wait()[1]:
        print(json.dumps(f"ended with {status}"))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What becomes of `import models.torchvision_ops` beside each torchvision."""
    folders = [tmp_path_factory.mktemp("torchvision") for _ in TORCHVISIONS]
    for folder, code in zip(folders, TORCHVISIONS.values(), strict=True):
        if code is not None:
            (folder / "torchvision").mkdir()
            (folder / "torchvision" / "__init__.py").write_text(code)
    command = [sys.executable, "-c", PROBE, *map(str, folders)]
    root = Path(__file__).resolve().parents[1]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return dict(zip(TORCHVISIONS, map(json.loads, output.splitlines()), strict=True))


@pytest.mark.parametrize(
    ("torchvision", "outcome"),
    [
        ("operators of its own, in a library of any name", "left alone"),
        ("a library that does not load", "defined"),
        ("another failure", "RuntimeError: compiled with different CUDA major versions"),
        ("a module missing", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("not installed", "ModelError: timm needs torchvision, which is not installed: pip install torchvision"),
    ],
)
def test_operators_are_defined_only_where_torchvision_fails_for_want_of_them(
    torchvision: str, outcome: str, outcomes: dict[str, str]
) -> None:
    assert outcomes[torchvision] == outcome


def logits_of_a_compiled_vit() -> tuple[int, ...]:
    config = VisionTransformerConfig(width=16, depth=2, base_width=16, base_depth=2, num_heads=2, image_size=32)
    network = build(config, ParameterizationConfig(), seed=0).network
    return tuple(torch.compile(network, backend="eager")(torch.zeros(2, 3, 32, 32)).shape)


@pytest.mark.long
def test_a_vit_is_compiled_in_a_process_that_is_spawned() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(logits_of_a_compiled_vit).result(timeout=600)[0] == 2
