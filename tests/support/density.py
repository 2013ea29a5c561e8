"""How dense the code is: conditional expressions and nested comprehensions per 1,000 lines, long functions and files.

In:  Python files.
Out: a `Density` of all of them; as a program, a line per folder.
Knows nothing of what the code does. Lines of code are lines that are neither blank nor a comment.

    python -m tests.support.density engine app train launch.py
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Density:
    """Counts over some files."""

    lines: int
    conditionals: int
    nested: int

    @property
    def conditionals_per_1000(self) -> float:
        """Conditional expressions, `a if c else b`, per 1,000 lines of code."""
        return 1000 * self.conditionals / max(1, self.lines)

    @property
    def nested_per_1000(self) -> float:
        """Comprehensions with two `for`, or with another comprehension inside, per 1,000 lines of code."""
        return 1000 * self.nested / max(1, self.lines)


def is_nested(node: ast.AST) -> bool:
    """Whether this is a comprehension over two things, or one that holds another."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    inner = [each for each in ast.walk(node) if each is not node and isinstance(each, COMPREHENSIONS)]
    return len(node.generators) > 1 or bool(inner)


def measure(paths: Iterable[Path]) -> Density:
    """Count over these files."""
    lines = conditionals = nested = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for line in text.splitlines():
            stripped = line.strip()
            if stripped and not stripped.startswith("#"):
                lines += 1
        for node in ast.walk(ast.parse(text)):
            conditionals += isinstance(node, ast.IfExp)
            nested += is_nested(node)
    return Density(lines, conditionals, nested)


def long_functions(path: Path, most: int) -> list[tuple[str, int]]:
    """Names and lengths of the functions with more lines than that."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > most:
                found.append((node.name, length))
    return found


def main(places: list[str]) -> None:
    """Print a line per place."""
    for place in places:
        path = Path(place)
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        density = measure(files)
        sys.stdout.write(
            f"{place}: {density.lines:,} lines of code, {density.conditionals_per_1000:.1f} conditional expressions "
            f"and {density.nested_per_1000:.2f} nested comprehensions per 1,000\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
