"""Python code as it is laid out: a statement that is too long for a line is broken as ruff would.

    wrapped("    x = layers.Conv2D(32, 3, ...)(x)")

One statement at a time, of those that a script is made of: assignments, returns and calls.
"""

from __future__ import annotations

import ast

WIDTH = 100  # columns


def wrapped(line: str) -> str:
    """One simple statement, over several lines where it is longer than WIDTH; its comment, if it
    has one, is left out there."""
    code = line.lstrip()
    indent = len(line) - len(code)
    if len(line) <= WIDTH or code.startswith("#"):
        return line
    statement = ast.parse(code).body[0]
    code = ast.get_source_segment(code, statement) or code
    value = getattr(statement, "value", None)  # of an assignment, a return, a call
    before = code.encode()[: value.col_offset].decode() if value else code
    return _laid_out(before, code.removeprefix(before), "", indent)


def quoted(text: str) -> str:
    """A string literal, in double quotes where it holds none."""
    literal = repr(text)
    if literal.startswith("'") and '"' not in text:
        return '"' + literal[1:-1].replace("\\'", "'") + '"'
    return literal


def _laid_out(before: str, code: str, after: str, indent: int) -> str:
    line = " " * indent + before + code + after
    if len(line) <= WIDTH:
        return line
    parts = _parts(code, WIDTH - indent - len(before))
    if parts is None:
        return line
    head, items, tail = parts
    body = ", ".join(name + value for name, value in items)
    inner = indent + 4
    if inner + len(body) <= WIDTH:
        lines = [" " * inner + body]
    elif len(items) == 1:
        lines = [_laid_out(*items[0], "", inner)]
    else:
        lines = [_laid_out(name, value, ",", inner) for name, value in items]
    return "\n".join([" " * indent + before + head, *lines, " " * indent + tail + after])


def _parts(code: str, width: int) -> tuple[str, list[tuple[str, str]], str] | None:
    """Up to the bracket that is opened, what is in it (name= or key:, value), and the rest."""
    node = ast.parse(code, mode="eval").body
    source = code.encode()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Call):  # Conv2D(32, 3)(x)
        too_long = len(source[: node.func.end_col_offset].decode()) + 1 > width
        if too_long and (node.func.args or node.func.keywords):
            node = node.func

    def text(part: ast.expr) -> str:
        return source[part.col_offset : part.end_col_offset].decode()

    items: list[tuple[str, str]]
    opening = node.col_offset
    if isinstance(node, ast.Call):
        opening = source.index(b"(", node.func.end_col_offset)
        items = [("", text(value)) for value in node.args]
        items += [(f"{keyword.arg}=", text(keyword.value)) for keyword in node.keywords]
    elif isinstance(node, ast.List | ast.Tuple):
        items = [("", text(value)) for value in node.elts]
    elif isinstance(node, ast.Dict):
        items = [
            (f"{text(key)}: ", text(value))
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        ]
    else:
        return None
    if not items:
        return None
    closing = (node.end_col_offset or 0) - 1
    return source[: opening + 1].decode(), items, source[closing:].decode()
