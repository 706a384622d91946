"""A study's images are made ready before any of its runs is launched."""

import time
from pathlib import Path

from rich.console import Console

from depthmup.data.config import DataConfig
from depthmup.data.index import INDEX_NAME, Index
from depthmup.data.plan import check_source
from depthmup.launch.jobs import slurm
from depthmup.launch.progress import display
from depthmup.launch.runs.fits import check_batches, check_fits
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.written import check_writable


def pack_source(data: DataConfig, console: Console) -> None:
    """Packs data.source where there are no shards yet. Raises UserError, also for shards of another source."""
    root = Path(data.root)
    if (root / INDEX_NAME).exists():
        check_source(root, data.source, data.validation_share)
    if not data.source or (root / INDEX_NAME).exists():
        return
    from depthmup.data.pack import pack

    with display(console, f"packing {data.source}") as shown:
        started = time.monotonic()

        def progress(done: int, total: int) -> None:
            rate = done / (time.monotonic() - started)
            shown.update(done / total, f"{done} of {total} images, {rate:.0f}/s", final=done == total)

        _, left_out = pack(data.source, root, validation_share=data.validation_share, progress=progress)
    for line in left_out:
        console.print(line, highlight=False, markup=False)


def prepare_data(study: Study, console: Console) -> None:
    """Packs data.source where there are no shards yet. Checks that the images are those of the model, and at least a
    batch. Raises UserError."""
    check_writable(study.file.directory)
    check_fits(study)  # before an hour of packing
    if study.file.launch.cluster == "slurm":
        slurm.require_slurm()
    data = study.file.data
    pack_source(data, console)
    index = Index.load(data.root, data.trust)
    index.check_classes(study.file.model.num_classes)
    index.check_files()
    check_batches(study, index)
