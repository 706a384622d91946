"""What the fork server has done before it forks: each process would else read the sources of the code again, import
DeepSpeed, which takes longer than most of the tests' runs, and walk through all of it when it collects garbage."""

import gc
import os
from contextlib import suppress
from importlib import import_module

from depthmup.train.owner import code_fingerprint

code_fingerprint()
os.environ["DS_ACCELERATOR"] = "cpu"  # as the environments have it that train_processes makes
for name in ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"):  # its first run imports the second
    with suppress(ImportError):  # it is optional
        import_module(name)
gc.collect()
gc.freeze()
