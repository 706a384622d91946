"""Makes `import torchvision` (and so `import timm`) work where torchvision was built for another torch.

Package indexes carry torchvision built for CUDA only. Its operator library cannot load beside a CPU torch, and
`import torchvision` then fails with "operator torchvision::nms does not exist". No operator of that library is used
here, so it is enough that their schemas exist. They are defined only after torchvision itself has failed in this way:
the library has another file name in some versions, and to define an operator a second time ends the process.

Import this module before the first import of timm or torchvision.
"""

import importlib
import re

import torch

from depthmup.models.errors import ModelError

FAILURE = re.compile(r"operator torchvision::\w+ does not exist")


def import_torchvision() -> "torch.library.Library | None":
    """Imports torchvision; defines its operators' schemas when that fails for them, and returns what must live on.

    Raises ModelError without torchvision, and what torchvision raises when it fails for another reason.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ModelError("timm needs torchvision, which is not installed: pip install torchvision") from None
    except RuntimeError as error:
        if not FAILURE.search(str(error)):
            raise
        operators = torch.library.Library("torchvision", "FRAGMENT")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return operators
    return None


OPERATORS = import_torchvision()
