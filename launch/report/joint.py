"""The report of a search or of a verification, and what a repository keeps of it."""

import shutil
from pathlib import Path

from rich.console import Console

from depthmup.launch.runs.joint import JointStudy
from depthmup.launch.runs.search import Search
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.tuned import after_file, study_after
from depthmup.launch.runs.verification import Verification


def show_joint(study: JointStudy, console: Console) -> Study | None:
    """Writes and prints it. Returns the study that is kept for after a search, now with the tuned values. Raises
    UserError before the runs' end."""
    if isinstance(study, Verification):
        from depthmup.launch.report.verification import show_verification

        show_verification(study, console)
        return None
    from depthmup.launch.report.search import show_search

    assert isinstance(study, Search)
    found = show_search(study, console)
    return study_after(study, found.winners[0].values) if after_file(study).exists() else None


def publish_joint(study: JointStudy, folder: Path) -> list[Path]:
    """Copies the record that `show_joint` has written to `folder` as NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    record = study.file.directory / ("search.json" if isinstance(study, Search) else "verify.json")
    return [Path(shutil.copyfile(record, folder / f"{study.file.study.name}.json"))]
