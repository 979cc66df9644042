"""A real instruction dataset out of the documentation strings of Python's own standard library.

    python3 examples/stdlib_docs.py OUT

writes OUT/train.jsonl and OUT/heldout.jsonl, one {"instruction", "output"} a line. The held-out rows come from modules
of their own, so nothing about them is seen in training. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Iterator

HELD_OUT = frozenset(
    {"argparse", "calendar", "csv", "fractions", "heapq", "pathlib", "shutil", "statistics", "tarfile"}
)
"""Top-level modules that are never trained on."""

NOT_DOCUMENTATION = ("test", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip", "__")
MIN_WORDS, MAX_WORDS = 4, 80
SEED = 42

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Row(TypedDict):
    """A question and its answer."""

    instruction: str
    output: str


def main() -> None:
    """Write both files and say what is in them."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):  # noqa: PLR2004 - one argument
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {"train": [], "heldout": []}
    seen: set[str] = set()
    for module, path in modules(Path(sysconfig.get_path("stdlib"))):
        split = "heldout" if module.split(".")[0] in HELD_OUT else "train"
        for row in rows_of(module, path):
            if row["output"] not in seen:
                seen.add(row["output"])
                rows[split].append(row)
    for split, found in rows.items():
        random.Random(SEED).shuffle(found)  # noqa: S311 - no secret
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{out / split}.jsonl: {len(found):,} rows")  # noqa: T201 - a command's answer


def modules(stdlib: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every documented module, in the order of names."""
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if any(part.startswith(NOT_DOCUMENTATION) for part in parts if part != "__init__"):
            continue
        yield ".".join(part for part in parts if part != "__init__"), path


def rows_of(module: str, path: Path) -> Iterator[Row]:
    """A row for each documented public class, function and method of a module."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in tree.body:
        if not isinstance(node, Documented) or node.name.startswith("_"):
            continue
        yield from row_of(f"{module}.{node.name}", node)
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, Documented) and not member.name.startswith("_"):
                    yield from row_of(f"{module}.{node.name}.{member.name}", member)


def row_of(name: str, node: Documented) -> Iterator[Row]:
    """The question about a name and the first paragraph of its documentation, if it is long enough to learn from."""
    documentation = ast.get_docstring(node)
    if not documentation:
        return
    answer = " ".join(documentation.split("\n\n")[0].split())
    if MIN_WORDS <= len(answer.split()) <= MAX_WORDS:
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        yield {"instruction": f"What is the {kind} {name} of Python's standard library for?", "output": answer}


if __name__ == "__main__":
    main()
