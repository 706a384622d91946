"""webdataset, imported without torch."""

import sys
from types import ModuleType


def import_webdataset() -> ModuleType:
    """webdataset needs torch for the classes that a training process iterates over, has stand-ins for them where there
    is no torch, and is used here to write and to group samples alone. So `pack` and `index` start without torch, whose
    import takes seconds in each of their processes. Whoever imports webdataset later gets one with torch.
    """
    if "torch" in sys.modules or "webdataset" in sys.modules:
        import webdataset

        return webdataset
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails as if it were not installed
    try:
        import webdataset
    finally:
        del sys.modules["torch"]
        for name in [name for name in sys.modules if name.partition(".")[0] == "webdataset"]:
            del sys.modules[name]
    return webdataset
