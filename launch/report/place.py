"""Where a command writes what it found: the study's folder, or another one where that is a colleague's."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.launch.runs.study import Study

NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)  # the last: a folder that cannot be made, as in /proc


def choose_results_folder(study: Study, out: Path | None) -> Path:
    """The study's own, or that of its name in `out`."""
    return out / study.file.study.name if out else study.file.directory


@contextmanager
def open_results(study: Study, out: Path | None, verb: str = "report") -> Iterator[Path]:
    """`choose_results_folder`, which is made. Raises UserError where the block may not write there, with the command
    that writes elsewhere."""
    folder = choose_results_folder(study, out)
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


def copy_results(root: Path, folder: Path, names: Mapping[str, str]) -> list[Path]:
    """Copies those of the files of `names` that are in `root` to `folder`, which is made, by their names there. Returns
    the copies."""
    folder.mkdir(parents=True, exist_ok=True)
    originals = {folder / new: root / old for old, new in names.items() if (root / old).exists()}
    for copy, original in originals.items():
        write_atomically(copy, original.read_bytes())
    return [*originals]
