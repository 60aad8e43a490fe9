"""Measure how a source tree is laid out: its modules, who imports them, long functions, class names used twice."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

MIN_LINES = 80  # a module below this size with one importer belongs into that importer
MAX_FUNCTION_LINES = 40
MAX_COMPLEXITY = 10

# Not the product: tests, frozen migrations, and the programs that measure or demonstrate it.
EXCLUDED = ("tests/", "migrations/", "bench/", "scripts/")


@dataclass(frozen=True, slots=True)
class Module:
    """A Python file with its path relative to the root of the tree."""

    path: str
    tree: ast.Module
    lines: int

    @property
    def name(self) -> str:
        """Return the dotted name, which for a package's ``__init__.py`` is that of the package."""
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @property
    def is_entry_point(self) -> bool:
        """Tell whether something other than an import starts the module: Flask, Click, or ``python -m``."""
        is_root_module = "/" not in self.path
        return (
            is_root_module
            or self.path.endswith("__init__.py")
            or '__name__ == "__main__"' in ast.unparse(self.tree).replace("'", '"')
        )


def product_files(root: Path) -> list[str]:
    """List the ``*.py`` files that git tracks or would add, without ``EXCLUDED``."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()
    return [path for path in sorted(set(listed)) if not path.startswith(EXCLUDED) and (root / path).is_file()]


def read_modules(root: Path, paths: Iterable[str]) -> list[Module]:
    """Parse the files."""
    modules = []
    for path in paths:
        text = (root / path).read_text()
        modules.append(Module(path, ast.parse(text, path), len(text.splitlines())))
    return modules


def importers(modules: Iterable[Module]) -> dict[str, set[str]]:
    """Return, for each module's name, the names of the modules that import it or something from it."""
    by_name = {module.name: module for module in modules}
    found: dict[str, set[str]] = {name: set() for name in by_name}
    for module in by_name.values():
        for imported in _imports_of(module.tree):
            if imported in found and imported != module.name:
                found[imported].add(module.name)
    return found


def _imports_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def small_with_one_importer(modules: Iterable[Module]) -> list[tuple[str, str]]:
    """Return the modules below ``MIN_LINES`` that at most one module imports, each with that one; no entry points."""
    modules = list(modules)
    users = importers(modules)
    return [
        (module.path, next(iter(users[module.name]), "nothing"))
        for module in modules
        if module.lines < MIN_LINES and len(users[module.name]) <= 1 and not module.is_entry_point
    ]


def small_entry_points(modules: Iterable[Module]) -> list[str]:
    """Return the exceptions: entry points below ``MIN_LINES`` with at most one importer."""
    modules = list(modules)
    users = importers(modules)
    return [
        module.path
        for module in modules
        if 0 < module.lines < MIN_LINES and len(users[module.name]) <= 1 and module.is_entry_point
    ]


def classes_of_one_name(modules: Iterable[Module]) -> dict[str, list[str]]:
    """Return the public class names that are defined at the top level of two or more modules, with those modules."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for module in modules:
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(module.path)
    return {name: paths for name, paths in sorted(found.items()) if len(paths) > 1}


def long_functions(modules: Iterable[Module]) -> list[tuple[str, str, int]]:
    """Return path, name and number of lines of each function longer than ``MAX_FUNCTION_LINES``, longest first."""
    found = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found.append((module.path, node.name, lines))
    return sorted(found, key=lambda item: -item[2])


def complex_functions(root: Path, paths: Iterable[str]) -> list[str]:
    """Return what ruff says of each function whose cyclomatic complexity is over ``MAX_COMPLEXITY``."""
    limit = f"lint.mccabe.max-complexity={MAX_COMPLEXITY}"
    options = ["check", "--select", "C901", "--config", limit, "--output-format", "json", "--exit-zero", *paths]
    ruff = [sys.executable, "-m", "ruff"]
    done = subprocess.run([*ruff, *options], cwd=root, check=True, capture_output=True, text=True)
    return [
        f"{Path(item['filename']).relative_to(root)}:{item['location']['row']} {item['message']}"
        for item in json.loads(done.stdout)
    ]


class ModuleTrace:
    """Records which files below ``root`` run code in the current thread while the context is open.

    Example::

        with ModuleTrace(root) as trace:
            client.post("/register", json=fields)
        trace.files  # {"app.py", "web/api/devices.py", ...}
    """

    def __init__(self, root: Path, *, excluded: tuple[str, ...] = EXCLUDED) -> None:
        self._prefix = f"{root.resolve()}/"
        self._excluded = excluded
        self._names: dict[str, str] = {}
        self._before: Callable[..., Any] | None = None
        self.calls: dict[str, int] = {}
        self.changes = 0  # how often a call led from one file of ours into another
        self._last = ""

    @property
    def files(self) -> set[str]:
        return set(self.calls)

    def __enter__(self) -> ModuleTrace:
        self._before = sys.getprofile()
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _called(self, frame: FrameType, event: str, _argument: object) -> None:
        if event != "call":
            return
        filename = frame.f_code.co_filename
        name = self._names.get(filename)
        if name is None:
            name = self._names[filename] = self._name_of(filename)
        if name:
            self.calls[name] = self.calls.get(name, 0) + 1
            self.changes += name != self._last
            self._last = name

    def _name_of(self, filename: str) -> str:
        if not filename.startswith(self._prefix):
            return ""
        name = filename.removeprefix(self._prefix)
        return "" if name.startswith((*self._excluded, ".venv/")) else name


class CallOrder:
    """Records the functions below ``root`` in the order of their first calls in the current thread.

    Each is ``path.py:Class.method``, as docs/changing.md names them.
    """

    def __init__(self, root: Path) -> None:
        self._prefix = f"{root.resolve()}/"
        self._before: Callable[..., Any] | None = None
        self.functions: dict[str, None] = {}

    def __enter__(self) -> CallOrder:
        self._before = sys.getprofile()
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _called(self, frame: FrameType, event: str, _argument: object) -> None:
        filename = frame.f_code.co_filename
        if event == "call" and filename.startswith(self._prefix):
            self.functions.setdefault(f"{filename.removeprefix(self._prefix)}:{frame.f_code.co_qualname}")


def figures(root: Path) -> Mapping[str, Any]:
    """Return everything that can be counted without running the product, under the names that are printed."""
    paths = product_files(root)
    modules = read_modules(root, paths)
    return {
        "modules": len(modules),
        "lines": sum(module.lines for module in modules),
        "small_with_one_importer": small_with_one_importer(modules),
        "small_entry_points": small_entry_points(modules),
        "classes_of_one_name": classes_of_one_name(modules),
        "long_functions": long_functions(modules),
        "complex_functions": complex_functions(root, paths),
    }
