"""What a Python source defines and does, apart from its words and its layout. Imports no torch."""

import ast
import hashlib
from functools import lru_cache
from typing import Any

from depthmup.models.errors import ModelError

DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def remove_docstring(node: ast.AST) -> list[ast.stmt]:
    """The statements of `node`'s body that do something."""
    body: list[ast.stmt] = getattr(node, "body", [])
    first = body[0] if body else None
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if is_docstring and isinstance(first.value.value, str) else body  # type: ignore[union-attr]


def strip_syntax(tree: ast.AST) -> str:
    """A syntax tree as text, without docstrings, and without what is empty: newer Pythons add empty fields.

    Each node is followed by the number of its fields, and by their names and values, each list by its length and its
    items. A loop with a stack takes a quarter of the time of a recursion: every process that trains waits for it.
    """
    words: list[str] = []
    stack: list[Any] = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, ast.AST):
            kind, parts = type(item), []
            for name in kind._fields:
                value = remove_docstring(item) if name == "body" and kind in DEFINITIONS else getattr(item, name, None)
                if value is not None and value != []:
                    parts += [value, name]
            words.append(f"{kind.__name__} {len(parts)}")
            stack += parts
        elif isinstance(item, list):
            words.append(f"list {len(item)}")
            stack += item
        else:
            words.append(repr(item))
    return "\0".join(words)


@lru_cache(maxsize=16)
def fingerprint_source(text: str) -> str:
    """12 hexadecimal digits of what `text` does: comments, docstrings and layout do not enter."""
    return hashlib.sha256(strip_syntax(ast.parse(text)).encode()).hexdigest()[:12]


@lru_cache(maxsize=16)
def list_defined_names(code: str) -> tuple[str, ...]:
    """Names that a Python source defines or imports, at any depth. Raises ModelError for what is no Python."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte
        place = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ModelError(f"not Python{place}: {error.msg if isinstance(error, SyntaxError) else error}") from None
    names: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.append(name)
            case ast.alias(name=name, asname=other):
                names.append(other or name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.append(name)
    return tuple(dict.fromkeys(names))
