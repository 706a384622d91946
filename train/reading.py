"""From a YAML file to a checked configuration, and back."""

import dataclasses
import difflib
import json
import types
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from depthmup.data.errors import UserError
from depthmup.data.paths import expand_path
from depthmup.models.config import AnyModelConfig
from depthmup.models.config_errors import describe_error, strip_echoes
from depthmup.train.config import RunConfig
from depthmup.train.rundir import explain_unreadable
from depthmup.train.yaml_text import dump_yaml, load_yaml

Config = TypeVar("Config")
Missing = TypeVar("Missing")


STUDY_SECTIONS = ("study", "tune", "verify", "launch")  # without them a file is the configuration of one run


def set_dotted(raw: dict[str, Any], override: str) -> None:
    """Applies one `section.key=value`; the value is read as YAML. A key of a space has a point itself:
    `tune.space.optimizer.lr.first=2**-9`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"{override!r}: overrides look like model.depth=48 or optimizer.lr=2**-9")
    parts = path.strip().split(".")
    if len(parts) > 3 and parts[1] == "space":
        parts[2:4] = [".".join(parts[2:4])]
    *sections, key = parts
    if not all((*sections, key)):
        raise UserError(f"{override!r}: a name is missing beside a point; write it like model.depth=48")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise UserError(f"{override!r}: {section} is not a section")
    raw[key] = load_yaml(text, override)


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a file, without top-level keys x-..., which hold anchors. Raises UserError."""
    try:
        raw = load_yaml(path.read_text(encoding="utf-8-sig"), str(path))  # whatever the locale; editors mark files so
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not YAML: not text in UTF-8") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise UserError(f"{path}: expected sections (model:, optimizer:, ...), found {found}")
    return {key: value for key, value in raw.items() if not str(key).startswith("x-")}


def run_in(raw: dict[str, Any], source: str) -> RunConfig:
    """One run of a file's plain data; a study's own sections are left aside. Raises UserError."""
    return from_plain(RunConfig, {key: raw[key] for key in raw if key not in STUDY_SECTIONS}, source)


def list_keys(cls: Any, prefix: str = "") -> list[str]:
    """Every key of the dataclass `cls`: model, model.width, ..."""
    found: list[str] = []
    for name, hint in get_type_hints(cls, include_extras=True).items():
        found.append(prefix + name)
        found += [inner for section in list_dataclasses(hint) for inner in list_keys(section, f"{prefix}{name}.")]
    return list(dict.fromkeys(found))


def suggest_key(cls: Any, location: tuple[Any, ...]) -> str:
    """What may have been meant by the unknown key at `location`: the same key of another section, or one like it."""
    *sections, key = (str(part) for part in location if part not in FAMILIES)
    here = list_field_names(cls, location)
    elsewhere = [name for name in list_keys(cls) if name.endswith(f".{key}")]
    if ".".join((*sections, key)) in elsewhere:
        return f"another family has it; known in this one: {', '.join(here)}"
    nearest = elsewhere[:3] or [".".join((*sections, n)) for n in difflib.get_close_matches(key, here, 1, cutoff=0.5)]
    return f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"known: {', '.join(here)}"


def list_field_names(cls: Any, location: tuple[Any, ...]) -> list[str]:
    """Names of the fields that are allowed beside `location` in the dataclass `cls`, for a suggestion."""
    hints = [cls]
    for key in location[:-1]:
        hints = [found for hint in hints for found in find_hints_below(hint, key)]
    candidates = [found for hint in hints for found in list_dataclasses(hint)]
    return sorted({f.name for candidate in candidates for f in dataclasses.fields(candidate)})


def find_hints_below(hint: Any, key: Any) -> list[Any]:
    """What may stand under `key`, of a section, or an index, of a list, in a value of the type `hint`."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType, Annotated):
        return [found for argument in get_args(hint) for found in find_hints_below(argument, key)]
    if origin is tuple and isinstance(key, int):
        return list(get_args(hint))
    if origin is dict:
        return [get_args(hint)[1]]
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return []
    if key in FAMILIES:  # a discriminated union adds its tag to the location
        return [hint] if getattr(hint, "family", None) == key else []
    known = get_type_hints(hint, include_extras=True)
    return [known[key]] if key in known else []


FAMILIES = tuple(family.family for family in get_args(get_args(AnyModelConfig)[0]))


def list_dataclasses(hint: Any) -> list[Any]:
    """The sections that a field may hold. Annotations' pydantic validators are dataclasses, too, but no classes."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    if get_origin(hint) in (Union, types.UnionType, Annotated, tuple):
        return [found for argument in get_args(hint) for found in list_dataclasses(argument)]
    return []


def describe_validation_error(error: Any, cls: Any) -> str:
    """One pydantic error as 'key: what is wrong'."""
    location = tuple(part for part in error["loc"] if not str(part).startswith("<"))  # a tag of a union is no key
    key = ".".join(str(part) for part in location if part not in FAMILIES)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: unknown key; {suggest_key(cls, location)}"
    if error["type"] == "union_tag_invalid":
        tag = error["ctx"]["tag"]
        nearest = difflib.get_close_matches(tag, FAMILIES, 1) or FAMILIES
        return f"{key}.family: unknown {tag!r}; did you mean {' or '.join(map(repr, nearest))}?"
    if error["type"] == "union_tag_not_found":
        return f"{key}.family: missing; use {' or '.join(map(repr, FAMILIES))}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key}: missing"
    said = describe_error(error)
    return f"{key}: {said}" if key else said  # a rule over several sections names its keys itself


ADAPTERS: dict[Any, Any] = {}


def make_adapter(cls: Any) -> Any:
    """pydantic's validator of `cls`, built once: a study reads the same class thousands of times."""
    if cls not in ADAPTERS:
        ADAPTERS[cls] = TypeAdapter(cls)
    return ADAPTERS[cls]


def insert_code(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Plain data in which the text of a builder's file stands for the file. Raises UserError."""
    model = raw.get("model")
    if not isinstance(model, dict) or ":" not in str(builder := model.get("builder", "")):
        return raw
    file, _, function = str(builder).rpartition(":")
    try:
        code = Path(expand_path(file)).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{source}: model.builder: {file}: {error.strerror} (seen from the working folder)") from None
    except UnicodeDecodeError:
        raise UserError(f"{source}: model.builder: {file}: not text in UTF-8") from None
    return {**raw, "model": {**model, "builder": function, "code": code}}


def read_json(kind: type[Config], file: Path, missing: Missing) -> Config | Missing:
    """What `file` holds, as a `kind`; `missing` where there is no file. Raises UserError for one of another shape."""
    try:
        found: Config = make_adapter(kind).validate_json(file.read_bytes())
    except FileNotFoundError:
        return missing
    except ValidationError:
        raise explain_unreadable(file) from None
    return found


def from_plain(cls: type[Config], raw: dict[str, Any], source: str) -> Config:
    """Plain data -> `cls`. Raises UserError that names `source`, every bad key and the nearest valid name."""
    try:
        return make_adapter(cls).validate_python(insert_code(raw, source), context={"reading": source})
    except ValidationError as error:
        problems = [describe_validation_error(item, cls) for item in strip_echoes(error.errors(include_url=False))]
        raise UserError(f"{source}: " + "; ".join(problems)) from None


def to_plain(config: Any) -> Any:
    """A config as plain data that `from_plain` reads back."""
    return json.loads(make_adapter(type(config)).dump_json(config))


def to_yaml(config: Any) -> str:
    return dump_yaml(to_plain(config))
