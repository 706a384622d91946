"""What `pack` was told to put into a folder: recorded there, so that another pack is not mixed into it."""

import json
from pathlib import Path
from typing import Any

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.index import INDEX_NAME

PLAN_NAME = "pack.json"  # stays beside index.json: what was packed, and how
KEYS = {"source", "archive", "images", "listing", "left_out", "options"}


def list_differences(recorded: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """What another plan does otherwise, in words; of the same images under another path nothing."""
    found = []
    if recorded["listing"] != plan["listing"]:
        found.append(f"then {recorded['images']} images of {recorded['source']}, now {plan['images']} others")
    for name, value in plan["options"].items():
        if (before := recorded["options"].get(name)) != value:
            shown = ["unset" if choice is None else choice for choice in (before, value)]
            found.append(f"then --{name} {shown[0]}, now {shown[1]}")
    return found


def read_plan(out: Path) -> dict[str, Any] | None:
    """What was packed into `out`, None where nothing was. Raises UserError for a file that this command did not write
    so."""
    path = out / PLAN_NAME
    try:
        found = json.loads(path.read_text())
        whole = found.keys() >= KEYS and isinstance(found["options"], dict)
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: damaged, or another program's, and says what was packed: pack into another folder")
    return dict(found)


def check_source(root: Path, source: str | None, validation_share: float) -> None:
    """Raises UserError where the shards in `root` were packed from a source of another name, or with another share for
    validation, than a run states. Shards that were not packed here tell nothing."""
    recorded, mend = read_plan(root), f"or pack into another data.root than {root}"
    if recorded is None:
        return
    packed, before = recorded["source"], recorded["options"].get("validation-share")
    if source is not None and Path(source).name != Path(packed).name:
        raise UserError(
            f"data.source {source} would do nothing: {root} holds what was packed of {packed}: leave data.source out, "
            f"{mend}"
        )
    if validation_share not in (0, before):
        raise UserError(
            f"data.validation_share {validation_share:g} would do nothing: {root} was packed with {before}: state "
            f"that, {mend}"
        )


def check_plan(out: Path, plan: dict[str, Any]) -> None:
    """Raises UserError when `out` holds anything but shards of `plan`; else records the plan there."""
    if recorded := read_plan(out):
        if found := list_differences(recorded, plan):
            raise UserError(
                f"{out}: holds another pack ({'; '.join(found)}). Pack into another folder, or delete this one first"
            )
    elif (out / INDEX_NAME).exists():
        raise UserError(f"{out}: holds shards that were not packed by this command. Pack into another folder")
    write_atomically(out / PLAN_NAME, (json.dumps(plan, indent=1) + "\n").encode())
