"""The code that a job runs: a copy taken at submission, so that an edit while the job waits changes nothing."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from depthmup.data.files import write_atomically
from depthmup.data.paths import PACKAGE
from depthmup.train.owner import COPY_DESCRIPTION, fingerprint_code

PACKAGES = ("models", "data", "train", "launch")


def list_sources() -> list[Path]:
    """Every file of the packages, templates and scripts with the code, relative to PACKAGE; without Python's caches."""
    found = (file for package in PACKAGES for file in (PACKAGE / package).rglob("*"))
    files = (file for file in found if file.is_file() and "__pycache__" not in file.parts)
    return sorted(file.relative_to(PACKAGE) for file in (PACKAGE / "__init__.py", *files))


def hash_sources(files: list[Path]) -> str:
    """12 hexadecimal digits of the files' names and contents."""
    hashed = hashlib.sha256()
    for file in files:
        hashed.update(f"{file}\0".encode() + (PACKAGE / file).read_bytes())
    return hashed.hexdigest()[:12]


def copy_code(folder: Path) -> Path:
    """Copies the packages to folder/DIGEST, unless they are there; returns that path, to import from."""
    files = list_sources()
    target = folder / hash_sources(files)
    if not target.exists():
        temporary = folder / f".{target.name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            for file in files:
                copy = temporary / PACKAGE.name / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(PACKAGE / file, copy)
            described = describe_code() | {"fingerprint": fingerprint_code()}
            write_atomically(temporary / COPY_DESCRIPTION, json.dumps(described, indent=1).encode())
            os.replace(temporary, target)
        except BaseException:  # as on a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def ask_git(*arguments: str) -> str | None:
    """What git prints in the packages' repository; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ("git", "-C", str(PACKAGE.resolve()), *arguments), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def describe_code() -> dict[str, Any]:
    """The commit and what differs from it; nulls where git does not track the packages. `digest` is always known."""
    folders = [str((PACKAGE / package).resolve()) for package in PACKAGES]  # git does not follow links
    sha = ask_git("rev-parse", "HEAD") if ask_git("ls-files", "--error-unmatch", *folders) else None  # none in a .venv
    return {
        "sha": sha.strip() if sha else None,
        "diff": ask_git("diff", "HEAD", "--", *folders) if sha else None,
        "digest": hash_sources(list_sources()),
    }
