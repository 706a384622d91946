"""What pages say of the code is written by the code: a line `<!-- NAME -->` of a page stands for one of PARTS."""

import ast
import dataclasses
import inspect
import io
import json
import math
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter

from depthmup.launch.config import StudyFile
from depthmup.launch.report.page import format_markdown_table
from depthmup.models import parameterization
from depthmup.models.config import AnyModelConfig, ModelConfig
from depthmup.models.optimizer_config import RoleRates
from depthmup.models.parameterization import TABLE, Formula, Role

Schema = dict[str, Any]

# ---------------------------------------------------------------- words, from the comments beside fields


def comments(owner: type) -> dict[str, str]:
    """What the comments right above a class's fields, and in their own lines, say of them, by the fields' names."""
    source = textwrap.dedent(inspect.getsource(owner))
    beside, alone = dict[int, str](), dict[int, str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            own_line = not token.line[: token.start[1]].strip()
            (alone if own_line else beside)[token.start[0]] = token.string.lstrip("# ")
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement in definition.body:
        if not isinstance(statement, ast.AnnAssign | ast.Assign):
            continue
        target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
        first = statement.lineno
        while first - 1 in alone:
            first -= 1
        lines = range(first, (statement.end_lineno or first) + 1)
        words = [(alone | beside)[line] for line in lines if line in alone or line in beside]
        if isinstance(target, ast.Name) and words:
            found[target.id] = " ".join(words)
    return found


def entries(owner: type) -> tuple[str, dict[str, str]]:
    """A docstring without what it says of single keys (`KEY: words`, `KEY, KEY: words`); and these words, by key."""
    names, rest, found = {each.name for each in dataclasses.fields(owner)}, list[str](), dict[str, str]()
    current: list[str] = []
    for line in (inspect.getdoc(owner) or "").splitlines():
        head, colon, words = line.partition(": ")
        if colon and names.issuperset(head.split(", ")):
            current = head.split(", ")
        elif not line or re.match(r"\w+: ", line):
            current = []
        else:
            words = line
        if current:
            found |= {name: f"{found.get(name, '')} {words}".strip() for name in current}
        else:
            rest.append(line)
    return "\n".join(rest).strip(), found


def words_of(owner: type) -> dict[str, str]:
    """What is said of a dataclass's fields, in its bases too."""
    if owner is RoleRates:
        return {role.value: comments(Role)[role.name] for role in Role}
    said: dict[str, str] = {}
    for base in (base for base in reversed(owner.__mro__) if dataclasses.is_dataclass(base)):
        beside, above = comments(base), entries(base)[1]
        said |= {name: "; ".join(filter(None, [beside.get(name), above.get(name)])) for name in beside | above}
    return said


# ---------------------------------------------------------------- the keys of a configuration


def dataclasses_in(annotation: Any) -> Iterator[type]:
    """Every dataclass that a type names, and those that their fields name."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        yield annotation
        for hint in get_type_hints(annotation, include_extras=True).values():
            yield from dataclasses_in(hint)
    for part in get_args(annotation):
        yield from dataclasses_in(part)


def bound(schema: Schema) -> str:
    """'above 0', 'from 0, below 1'. Schemas say it in two dialects."""
    words = {
        "exclusiveMinimum": "above",
        "gt": "above",
        "minimum": "from",
        "ge": "from",
        "exclusiveMaximum": "below",
        "lt": "below",
        "maximum": "up to",
        "le": "up to",
    }
    return ", ".join(f"{word} {schema[name]:g}" for name, word in words.items() if name in schema)


def describe_type(schema: Schema, definitions: dict[str, Schema]) -> str:
    """A field's type in words."""
    if "$ref" in schema:
        return f"`{{{', '.join(definitions[schema['$ref'].rpartition('/')[2]]['properties'])}}}`"
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if parts := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(describe_type(part, definitions) for part in parts))
    kind = schema.get("type")
    if kind == "array":
        items = [describe_type(part, definitions) for part in schema.get("prefixItems", [schema.get("items", {})])]
        count = f"{len(items)} of: " if "prefixItems" in schema else ""
        return f"list of {count}{', '.join(dict.fromkeys(items))}"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"NAME: {describe_type(values, definitions)}" if isinstance(values, dict) else "mapping"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`"}
    name = names.get(str(kind), "`null`" if kind == "null" else "any value")
    return " ".join(filter(None, [name, bound(schema)]))


def describe_default(schema: Schema, is_required: bool) -> str:
    if is_required:
        return "**needed**"
    return f"`{json.dumps(schema.get('default', {}))}`"


def key_row(
    key: "dataclasses.Field[Any]", prefix: str, schema: Schema, definitions: dict[str, Schema], words: dict[str, str]
) -> dict[str, str]:
    found = schema["properties"][key.name]
    said = words.get(key.name, "says which family this is" if "const" in found else "")
    return {
        "key": f"`{prefix}{key.name}`",
        "type": describe_type(found, definitions),
        "default": describe_default(found, key.name in schema.get("required", ())),
        "what it does": said if key.metadata.get("identity") is not False else f"{said} *(not in the hash)*",
    }


def key_rows(prefix: str, owner: type, definitions: dict[str, Schema], elsewhere: set[type]) -> list[dict[str, str]]:
    """A row per key of a section, those of sections within it included, but for classes with a table `elsewhere`."""
    words, schema, hints = words_of(owner), definitions[owner.__name__], get_type_hints(owner, include_extras=True)
    fields = {each.name: each for each in dataclasses.fields(owner)}
    rows = []
    for name, found in schema["properties"].items():
        rows.append(key_row(fields[name], prefix, schema, definitions, words))
        several = "[]" if found.get("type") == "array" else ".KEY" if "additionalProperties" in found else ""
        for inner in dict.fromkeys(dataclasses_in(hints[name])):
            if inner not in elsewhere:
                rows += key_rows(f"{prefix}{name}{several}.", inner, definitions, elsewhere)
    return rows


def section(title: str, owner: type | None, rows: list[dict[str, str]]) -> list[str]:
    escaped = [{column: cell.replace("|", "\\|") for column, cell in row.items()} for row in rows]
    introduction = [entries(owner)[0], ""] if owner else []
    return [f"## {title}", "", *introduction, *format_markdown_table(escaped), ""]


def keys() -> str:
    """Every key of a study's file, section by section."""
    schema = TypeAdapter(StudyFile).json_schema()
    definitions = schema["$defs"]
    hints, families = get_type_hints(StudyFile, include_extras=True), list(dataclasses_in(AnyModelConfig))
    owners = {name: found[0] for name, hint in hints.items() if (found := list(dataclasses_in(hint)))}
    elsewhere = {*owners.values(), *families}
    text = list[str]()
    for each in dataclasses.fields(StudyFile):
        if each.name == "model":
            shared = {own.name for own in dataclasses.fields(ModelConfig)}
            rows = {family: key_rows("model.", family, definitions, elsewhere) for family in families}
            of_all = [row for row in rows[families[0]] if row["key"].strip("`").removeprefix("model.") in shared]
            text += section("`model`", ModelConfig, of_all)
            for family, found in rows.items():
                kind = definitions[family.__name__]["properties"]["family"]["const"]
                text += section(f"`model` of `family: {kind}`", family, [row for row in found if row not in of_all])
        elif each.name in owners:
            own_rows = key_rows(f"{each.name}.", owners[each.name], definitions, elsewhere)
            text += section(f"`{each.name}`", owners[each.name], own_rows)
        else:
            text += section(f"`{each.name}`", None, [key_row(each, "", schema, definitions, words_of(StudyFile))])
    return "\n".join(text)


# ---------------------------------------------------------------- the table of rules


def power(letter: str, constant: float, of_alpha: float) -> str:
    """'N<sup>-1</sup>', 'L<sup>2&alpha;-1</sup>', '' for an exponent of 0."""
    if not constant and not of_alpha:
        return ""
    if not of_alpha:
        return letter if constant == 1 else f"{letter}<sup>{constant:g}</sup>"
    factor = {1.0: "", -1.0: "-"}.get(of_alpha, f"{of_alpha:g}")
    rest = f"{constant:+g}" if constant else ""
    return f"{letter}<sup>{factor}&alpha;{rest}</sup>"


def describe_formula(formula: Formula | None) -> str:
    """A cell of the table as a product of powers of N and L. Raises ValueError for one that is no such product."""
    if formula is None:
        return "as AdamW"
    if formula(1, 1, 0) == 0:
        return "0"
    of_width = math.log2(formula(2, 1, 0))
    constant = math.log2(formula(1, 2, 0))
    of_alpha = math.log2(formula(1, 2, 1)) - constant
    if not math.isclose(formula(3, 5, 0.3), 3**of_width * 5 ** (constant + 0.3 * of_alpha)):
        raise ValueError("a cell of the table is no product of powers of N and L")
    cells = filter(None, [power("N", of_width, 0), power("L", constant, of_alpha)])
    return " ".join(cells) or "1"


def rules() -> str:
    """The table of models/parameterization.py, the forward multipliers, and where each comes from."""
    columns = [field.name for field in dataclasses.fields(parameterization.Row)]
    headings = {
        "init_variance_sp": "init variance (`sp`)",
        "init_variance": "init variance",
        "lr_sgd": "lr, SGD",
        "lr_adam": "lr, AdamW",
        "eps_adam": "eps, AdamW",
        "weight_decay": "coupled decay, AdamW",
        "lr_muon": "lr, Muon",
    }
    cells = [
        {"role": f"`{role.value}`"} | {headings[column]: describe_formula(getattr(row, column)) for column in columns}
        for role, row in TABLE.items()
    ]
    words = comments(Role)
    roles = [{"role": f"`{role.value}`", "what": words[role.name]} for role in Role]
    multipliers = [
        {"where": where, "factor": inspect.getdoc(getattr(parameterization.Scale, f"{where}_multiplier")) or ""}
        for where in ("branch", "readout", "attention")
    ]
    presets = [{key: str(value) for key, value in vars(preset).items()} for preset in parameterization.PRESETS.values()]
    notes = inspect.getdoc(parameterization) or ""
    sources = notes[notes.index("Sources:") :]
    tables = [
        format_markdown_table(cells),
        format_markdown_table(roles),
        format_markdown_table(multipliers),
        format_markdown_table(presets),
    ]
    titles = ["Factors", "Roles", "Forward multipliers", "Presets"]
    text = [part for title, table in zip(titles, tables, strict=True) for part in (f"## {title}", "", *table, "")]
    return "\n".join([*text, "## Sources", "", link_papers(sources)])


def link_papers(text: str) -> str:
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)


PARTS = {"keys": keys, "rules": rules}


def fill_in(page: str) -> str:
    """A page's text with its parts in their places."""
    for name, write in PARTS.items():
        line = f"<!-- {name} -->"
        if line in page:
            page = page.replace(line, write())
    return page
