"""YAML as configurations use it: 1e6 and 2**20 are numbers, and no key may be there twice."""

import re
from typing import Any

import yaml

from depthmup.data.errors import UserError

FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML 1.1 wants a point and a sign: it reads 1e6 as text
POWER = re.compile(r"([-+]?\d+(?:\.\d*)?) *(?:\*\*|\^) *([-+]?\d+(?:\.\d*)?)")
MERGE = "tag:yaml.org,2002:merge"


class Loader(yaml.SafeLoader):
    """Reads more texts as numbers than YAML 1.1 does."""


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # the C one is ten times faster
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


Loader.add_constructor("!power", construct_power)


def refuse_duplicates(node: yaml.Node, source: str) -> None:
    """Raises UserError, with both lines, for a mapping that has a key twice: YAML would drop the first."""
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
                if key.value in lines:
                    raise UserError(
                        f"{source}:{line}: the key {key.value!r} is there already, in line {lines[key.value]}: "
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
        refuse_duplicates(node, source)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def dump_yaml(plain: Any) -> str:
    return str(yaml.dump(plain, Dumper=Dumper, sort_keys=False))
