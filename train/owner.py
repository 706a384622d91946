"""Whose a marker is: what done.json and a checkpoint say of the run that wrote them, of its code and of its data."""

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from depthmup.data.errors import UserError
from depthmup.data.fingerprint import INDEX_NAME, fingerprint_shards
from depthmup.data.paths import PACKAGE
from depthmup.data.storage import is_remote
from depthmup.models.source_code import strip_syntax
from depthmup.train.config import RunConfig, find_identity, flatten, run_hash
from depthmup.train.rundir import RunDirectory

PACKAGES = ("models", "data", "train")  # what a result depends on
COPY_DESCRIPTION = "code.json"  # beside a copy of PACKAGE that jobs run: see launch.jobs.code_copy
OWNER = ("run", "identity", "shards", "code", "trunk")  # what a done marker holds beside the result


# ---------------------------------------------------------------- whose


def flatten_identity(config: RunConfig) -> dict[str, Any]:
    """Every field that is part of the run's identity, by dotted name, as JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(flatten(find_identity(config))))
    return found


def describe_owner(config: RunConfig) -> dict[str, Any]:
    """What a marker holds for `check_owner`."""
    return {"run": run_hash(config), "identity": flatten_identity(config), "shards": fingerprint_data(config)}


def list_differences(marker: Mapping[str, Any], config: RunConfig) -> list[str]:
    """How the run that is the owner of `marker` is another than `config`, in words; empty for the same run.

    A field that only one of the two versions has, that which wrote the marker and this one, is at its default there: it
    makes another run where the hash says so. A default that has changed does, too, which the hash cannot see.
    """
    saved, now, stated = marker["identity"], flatten_identity(config), flatten(find_identity(config, defaults=False))
    different = [key for key in sorted(now) if (saved[key] != now[key] if key in saved else key in stated)]
    found = [f"{key}: {saved.get(key, 'not known')} there, {now[key]} here" for key in different]
    unknown = sorted(saved.keys() - now.keys()) if marker.get("run") != run_hash(config) else []
    return found + [f"{key}: {saved[key]} there, not known here" for key in unknown]


def check_owner(path: Path, marker: Mapping[str, Any], config: RunConfig, shards: str | None) -> None:
    """Raises UserError when the marker, read from `path`, is another run's than `config`, or was made with other images
    than those of the fingerprint `shards` (None: not known).

    A marker that does not say whose it is counts in a directory that is called by the run's hash, and nowhere else.
    """
    if "identity" not in marker:
        if path.parent.name == run_hash(config):
            return
        raise UserError(f"{path} does not say which run it belongs to: use another directory, or delete this one")
    if different := list_differences(marker, config):
        raise UserError(
            f"{path} belongs to another run ({'; '.join(different)}): use another directory, or its configuration"
        )
    if shards and marker.get("shards") not in (None, shards):
        raise UserError(
            f"{path}: trained on other images (shards {marker['shards']}) than {config.data.root} holds ({shards}): "
            "give the new images another data.name, or use another directory"
        )


def check_directory(directory: RunDirectory, config: RunConfig) -> None:
    """Raises UserError when the directory holds the result or the newest checkpoint of another run: before anything in
    it is touched."""
    markers = [directory.path / "done.json"]
    if steps := directory.list_checkpoint_steps():
        markers.append(directory.checkpoints / f"step-{max(steps)}" / "state.json")
    for path in markers:
        try:
            marker = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # none there, or damaged: whoever reads it for its content says so
        if isinstance(marker, dict) and isinstance(marker.get("identity"), dict):
            check_owner(path, marker, config, fingerprint_data(config))


def read_finished(directory: RunDirectory, config: RunConfig) -> dict[str, Any] | None:
    """The done marker of this very run; None before its end. Raises UserError when it is another run's."""
    if done := directory.done():
        check_owner(directory.path / "done.json", done, config, fingerprint_data(config))
    return done


def strip_owner(done: Mapping[str, Any]) -> dict[str, Any]:
    """What a run came to: its done marker without whose it is."""
    return {key: value for key, value in done.items() if key not in OWNER}


# ---------------------------------------------------------------- data


@cache
def read_fingerprint_of_file(root: str, splits: frozenset[str], changed: int) -> str | None:
    return fingerprint_shards(root, splits)


def fingerprint_data(config: RunConfig) -> str | None:
    """Of the shards of the splits that the run uses; None where there is no index. Raises UserError."""
    splits = frozenset({"train", *("val" for split in config.train.evaluate if split == "val")})
    root = config.data.root
    if is_remote(root):
        return fingerprint_shards(root, splits)
    file = Path(root) / INDEX_NAME
    return read_fingerprint_of_file(root, splits, file.stat().st_mtime_ns) if file.exists() else None


# ---------------------------------------------------------------- code


def join_fingerprints(before: str) -> str:
    """Fingerprints of the sources that made a result, joined by +: those `before` it was resumed, and the present."""
    return "+".join(dict.fromkeys([*filter(None, before.split("+")), fingerprint_code()]))


@cache
def fingerprint_code(root: Path = PACKAGE) -> str:
    """12 hexadecimal digits of the sources that a result depends on. Comments, docstrings and layout do not enter. A
    copy for jobs states them beside itself: to read the sources takes a process a tenth of the time of its start."""
    stated = root.parent / COPY_DESCRIPTION
    if stated.exists() and (known := json.loads(stated.read_text()).get("fingerprint")):
        return str(known)
    hashed = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            name = file.relative_to(root).as_posix()
            hashed.update(f"{name}\0{strip_syntax(ast.parse(file.read_bytes()))}\0".encode())
    return hashed.hexdigest()[:12]
