"""The main job: data, plan, launch, wait. Whatever is there already is used."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from data.errors import UserError
from data.index import INDEX_NAME, Index
from launch.progress import display, duration
from launch.study import PlannedRun, Study, count_flops

POLL_SECONDS = 0.5


def prepare_data(study: Study, console: Console) -> Index:
    """The data set's index; packs data.source first where there are no shards. Raises UserError."""
    study.check_writable()
    data = study.file.data
    root = Path(data.root)
    if data.source and not (root / INDEX_NAME).exists():
        from data.pack import pack

        with display(console, f"packing {data.source}") as shown:
            started = time.monotonic()

            def progress(done: int, total: int) -> None:
                rate = done / (time.monotonic() - started)
                shown.update(done / total, f"{done} of {total} images, {rate:.0f}/s", final=done == total)

            _, bad = pack(data.source, root, validation_share=data.validation_share, progress=progress)
        for line in bad:
            console.print(f"left out, not readable: {line}")
    index = Index.load(data.root, data.trust)
    if len(index.classes) != study.file.model.num_classes:
        raise UserError(
            f"{root} has {len(index.classes)} classes, but model.num_classes is {study.file.model.num_classes}"
        )
    index.check_files()
    return index


def launch(study: Study, runs: Sequence[PlannedRun]) -> list[Any]:
    """Writes the study and submits `runs`, the costliest first so that the slots end together. Failed runs go again."""
    from launch.submit import submit

    flops = count_flops(study.runs)
    study.write()
    ordered = sorted(runs, key=lambda run: -flops[run.size][1])
    for run in ordered:
        (run.directory.path / "failed.json").unlink(missing_ok=True)
    return list(submit(ordered, study.file.launch, study.file.directory / "jobs"))


def wait(study: Study, jobs: Sequence[Any], console: Console) -> None:
    """Shows progress until every job has ended. Raises UserError when runs are left over."""
    flops = count_flops(study.runs)
    pending = study.pending()
    total = sum(flops[run.size][1] for run in pending)
    started = time.monotonic()
    left, failed = pending, 0
    with display(console, "runs") as shown:
        while True:
            ended = all(job.done() for job in jobs)  # asked before the markers are read, so that none is missed
            left = [run for run in left if not run.directory.done()]
            failed = sum(run.directory.failed() is not None for run in left)
            running = sum(run.directory.log.exists() for run in left) - failed
            share = 1 - sum(flops[run.size][1] for run in left) / total
            elapsed = time.monotonic() - started
            eta = f"ETA {duration(elapsed / share - elapsed)}" if share > 0.02 else "ETA ..."
            text = f"{len(study.runs) - len(left)} of {len(study.runs)} done, {running} running, {eta}"
            shown.update(share, text + (f", {failed} failed" if failed else ""), final=ended)
            if ended:
                break
            time.sleep(POLL_SECONDS)
    if left:
        first = left[0].directory.failed() or {"error": "its job ended without a word; see the folder jobs"}
        raise UserError(
            f"{len(left)} of {len(study.runs)} runs did not finish ({left[0].directory.path}: {first['error']}). "
            f"Run the same command again to resume them"
        )
