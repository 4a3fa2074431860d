"""Sizes by folder: files, lines, functions and how long functions are.

`python scripts/size_report.py [ROOT...] [--json]`. Generated stubs are left out.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_ROOTS = ("chiron_engine", "kernels", "scripts", "tests")
GENERATED = ("_pb2.py", "_pb2_grpc.py")


@dataclass(frozen=True, slots=True)
class FunctionSize:
    name: str
    lines: int


@dataclass(slots=True)
class FolderSize:
    """What the Python files directly in one folder add up to."""

    files: int = 0
    lines: int = 0
    biggest_file: str = ""
    biggest_file_lines: int = 0
    functions: list[FunctionSize] = field(default_factory=list)

    def add(self, path: Path) -> None:
        source = path.read_text(encoding="utf-8")
        lines = source.count("\n")
        self.files += 1
        self.lines += lines
        if lines >= self.biggest_file_lines:
            self.biggest_file, self.biggest_file_lines = path.name, lines
        self.functions.extend(function_sizes(source))

    def summary(self) -> dict[str, object]:
        lengths = sorted(function.lines for function in self.functions)
        longest = max(self.functions, key=lambda function: function.lines, default=None)
        return {
            "files": self.files,
            "lines": self.lines,
            "functions": len(lengths),
            "median": percentile(lengths, 0.5),
            "p90": percentile(lengths, 0.9),
            "longest": asdict(longest) if longest else None,
            "biggest_file": {"name": self.biggest_file, "lines": self.biggest_file_lines},
        }


def function_sizes(source: str) -> list[FunctionSize]:
    """Every function and method, nested ones too, with its lines from `def` to its end."""
    return [
        FunctionSize(node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def percentile(ordered: list[int], share: float) -> int:
    """The value at or below which `share` of them lie (nearest rank); 0 for none."""
    if not ordered:
        return 0
    rank = -(-len(ordered) * share // 1)
    return ordered[max(int(rank), 1) - 1]


def measure(roots: list[Path], base: Path) -> dict[str, FolderSize]:
    folders: dict[str, FolderSize] = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if path.name.endswith(GENERATED):
                continue
            folder = path.parent.relative_to(base).as_posix()
            folders.setdefault(folder, FolderSize()).add(path)
    return folders


def table(folders: dict[str, FolderSize]) -> str:
    header = f"{'folder':<34}{'files':>6}{'lines':>7}{'functions':>10}{'median':>7}{'p90':>5}  longest"
    rows = [header]
    for name, folder in sorted(folders.items()):
        figures = folder.summary()
        longest = max(folder.functions, key=lambda function: function.lines, default=FunctionSize("-", 0))
        rows.append(
            f"{name:<34}{folder.files:>6}{folder.lines:>7}{figures['functions']:>10}{figures['median']:>7}"
            f"{figures['p90']:>5}  {longest.lines} {longest.name}"
            f" (biggest file {folder.biggest_file} {folder.biggest_file_lines})"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Sizes of files and functions by folder.")
    parser.add_argument("roots", nargs="*", help=f"folders to measure (default: {' '.join(DEFAULT_ROOTS)})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    roots = [Path(root).resolve() for root in options.roots] or [ROOT / root for root in DEFAULT_ROOTS]
    missing = [str(root) for root in roots if not root.is_dir()]
    if missing:
        print(f"no such folder: {', '.join(missing)}", file=sys.stderr)
        return 2
    base = ROOT if all(root.is_relative_to(ROOT) for root in roots) else Path(roots[0].anchor)
    folders = measure(roots, base)
    if options.json:
        print(json.dumps({name: folder.summary() for name, folder in sorted(folders.items())}, indent=1))
    else:
        print(table(folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
