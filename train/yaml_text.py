"""YAML as configurations use it: 1e6 and 2**20 are numbers, and no key may be there twice."""

import re
from typing import Any

import yaml

from depthmup.data.errors import UserError

FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML 1.1 wants a point and a sign: it reads 1e6 as text
POWER = re.compile(r"([-+]?\d+(?:\.\d*)?) *(?:\*\*|\^) *([-+]?\d+(?:\.\d*)?)")
MERGE = "tag:yaml.org,2002:merge"


# The loader and the dumper in C, where PyYAML was built with them, are ten times faster.
class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads more texts as numbers than YAML 1.1 does."""


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes what `Loader` would read as a number."""


for handler in (Loader, Dumper):
    handler.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{FLOAT.pattern})$"), list("-+0123456789"))
    handler.add_implicit_resolver("!power", re.compile(f"^(?:{POWER.pattern})$"), list("-+0123456789"))


def construct_power(loader: Loader, node: yaml.ScalarNode) -> int | float | str:
    """'2**20' -> 1048576, '2**-9' -> 2^-9; what is no real number stays text, which no number's key takes."""
    match = POWER.fullmatch(node.value)
    assert match
    try:
        power = float(match[1]) ** float(match[2])
    except (OverflowError, ZeroDivisionError):
        return str(node.value)
    if isinstance(power, complex):
        return str(node.value)
    return int(power) if "." not in node.value and power.is_integer() else power


def construct_whole(loader: Loader, node: yaml.ScalarNode) -> int | str:
    """As people write whole numbers. YAML 1.1 reads 010 as 8, and 1:30 as 90 (sixtieths)."""
    text = node.value.replace("_", "")
    if ":" in text:
        return str(node.value)
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else loader.construct_yaml_int(node)


def construct_real(loader: Loader, node: yaml.ScalarNode) -> float | str:
    """As `construct_whole`."""
    return str(node.value) if ":" in node.value else loader.construct_yaml_float(node)


Loader.add_constructor("!power", construct_power)
Loader.add_constructor("tag:yaml.org,2002:int", construct_whole)
Loader.add_constructor("tag:yaml.org,2002:float", construct_real)


def refuse_slips(node: yaml.Node, source: str) -> None:
    """Raises UserError, with the line, for a mapping that has a key twice, of which YAML would drop the first; and for
    a colon without a space in {KEY:VALUE}, which to YAML is a key without a value."""
    seen: set[int] = set()

    def visit(node: yaml.Node) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                visit(item)
        if not isinstance(node, yaml.MappingNode):
            return
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                name, colon, rest = key.value.partition(":")
                if colon and node.flow_style and not key.style and value.start_mark.index == value.end_mark.index:
                    raise UserError(
                        f"{source}:{line}: a space is missing after the colon in {key.value!r}: write "
                        f"'{name}: {rest.strip()}'"
                    )
                if key.value in lines:
                    raise UserError(
                        f"{source}:{line}: the key {key.value!r} is given twice, first in line {lines[key.value]}: "
                        "keep one of them"
                    )
                lines[key.value] = line
            visit(value)

    visit(node)


def load_yaml(text: str, source: str) -> Any:
    """Raises UserError for a text that is no YAML, or has a key twice."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        refuse_slips(node, source)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """A text of several lines, as a builder's code, line by line."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Dumper.add_representer(str, represent_text)


def dump_yaml(plain: Any) -> str:
    return str(yaml.dump(plain, Dumper=Dumper, sort_keys=False))
