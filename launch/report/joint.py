"""The report of a search or of a verification, and what a repository keeps of it."""

from pathlib import Path

from rich.console import Console

from depthmup.launch.report.place import copy_results
from depthmup.launch.runs.joint import JointStudy
from depthmup.launch.runs.search import Search
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.tuned import locate_following_study, write_following_study
from depthmup.launch.runs.verification import Verification

RECORDS: dict[type[JointStudy], str] = {Search: "search.json", Verification: "verify.json"}


def show_joint(study: JointStudy, console: Console, out: Path | None = None) -> Study | None:
    """Prints it, and writes it into the study's folder, or that of its name in `out`. Returns the study that is kept
    for after a search, now with the tuned values. Raises UserError before the runs' end."""
    if isinstance(study, Verification):
        from depthmup.launch.report.verification import show_verification

        show_verification(study, console, out)
        return None
    from depthmup.launch.report.search import show_search

    assert isinstance(study, Search)
    found = show_search(study, console, out)
    return write_following_study(study, found.winners[0].values) if locate_following_study(study).exists() else None


def publish_joint(study: JointStudy, root: Path, folder: Path) -> list[Path]:
    """Copies the record that `show_joint` has written into `root` to `folder` as NAME.json."""
    return copy_results(root, folder, {RECORDS[type(study)]: f"{study.file.study.name}.json"})
