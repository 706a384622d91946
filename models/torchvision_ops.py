"""Makes `import torchvision` (and so `import timm`) work with a CPU build of torch.

Package indexes carry torchvision built for CUDA only. Its operator library cannot load beside a CPU torch, and
`import torchvision` then fails with "operator torchvision::nms does not exist". No operator of that library is used
here, so it is enough that their schemas exist. Import this module before the first import of timm or torchvision.
"""

import importlib.util
from pathlib import Path

import torch


def define_missing_operators() -> "torch.library.Library | None":
    """Loads torchvision's operators; defines their schemas when it cannot, and returns what must live on."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "_C.so"
    try:
        torch.ops.load_library(str(library))
    except OSError:
        operators = torch.library.Library("torchvision", "FRAGMENT")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return operators
    return None


OPERATORS = define_missing_operators()
