"""Where a command writes what it found: the study's folder, or another one where that is a colleague's."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from depthmup.data.errors import UserError
from depthmup.launch.runs.study import Study

NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)


def results_folder(study: Study, out: Path | None) -> Path:
    """The study's own, or that of its name in `out`."""
    return out / study.file.study.name if out else study.file.directory


@contextmanager
def open_results(study: Study, out: Path | None, verb: str = "report") -> Iterator[Path]:
    """`results_folder`, which is made. Raises UserError where the block may not write there, with the command that
    writes elsewhere."""
    folder = results_folder(study, out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise
        elsewhere = study.command(verb, "--out", "FOLDER")
        raise UserError(
            f"{error.filename}: {error.strerror}. To have it written to a folder of yours: {elsewhere}"
        ) from None
