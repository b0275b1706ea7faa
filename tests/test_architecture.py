"""The structure of the code: no import circles, no file that has become a folder, each number in one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from ldmi_fast.options import OptionKeywords, Options

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ldmi_fast"
MOST_LINES = 600


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, also inside functions; imports for type checkers excepted."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in for_types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped:
            continue
        start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*start, *([node.module] if node.module else [])])
        for alias in node.names:
            found = f"{base}.{alias.name}"
            yield from (found,) if found in MODULES else (base,) if base in MODULES else ()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle; none if there is none."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, (*path, name)):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := visit(name, ()))), [])


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert "ldmi_fast.process_groups" in set(imports("ldmi_fast.options")), "imports inside functions count"


def test_no_import_circle() -> None:
    # the package itself imports its public names, and every import of a module imports the package
    graph = {name: set(imports(name)) - {name, "ldmi_fast"} for name in MODULES if name != "ldmi_fast"}
    assert circle(graph) == []


@pytest.mark.parametrize(
    "module", ["ldmi_fast.distributed", "ldmi_fast.process_groups", "ldmi_fast.metrics", "triton", "torchmetrics"]
)
def test_what_most_programs_do_without_is_imported_when_it_is_needed(module: str) -> None:
    code = "import sys, torch, ldmi_fast; x = torch.randn(20, 3); ldmi_fast.dmi_loss(x, torch.arange(20) % 3);"
    code += f"sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0


def product_files() -> list[Path]:
    kinds = {".py", ".h", ".cuh", ".cu", ".cpp"}
    return [path for folder in ("ldmi_fast", "csrc") for path in sorted((ROOT / folder).rglob("*")) if path.suffix in kinds]


def test_no_file_is_a_folder_in_disguise() -> None:
    long = {
        str(path.relative_to(ROOT)): lines for path in product_files() if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long


EPSILON = re.compile(r"2(?:\.0)?\*\*-52|0x1p-52|2\.220446")
ABSENT_SHARE = re.compile(r"(?<![\w.])1e-12(?![\w.])")


def places(pattern: re.Pattern[str], folder: str) -> set[str]:
    """The files in which a number is written, outside of comments and docstrings."""
    found = set()
    for path in product_files():
        if path.relative_to(ROOT).parts[0] != folder:
            continue
        text = path.read_text()
        text = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
        text = re.sub(r"(#|//).*", "", text) if path.suffix == ".py" else re.sub(r"//.*", "", text)
        if pattern.search(text):
            found.add(str(path.relative_to(ROOT)))
    return found


def test_the_share_below_which_a_class_is_absent_is_in_one_place_a_language() -> None:
    assert places(ABSENT_SHARE, "ldmi_fast") - {"ldmi_fast/engines/verify.py"} == {"ldmi_fast/presence.py"}
    assert len(places(ABSENT_SHARE, "csrc")) == 1


def test_the_threshold_for_singular_is_in_one_place_in_python() -> None:
    assert places(EPSILON, "ldmi_fast") == {"ldmi_fast/precision.py"}


def test_type_checkers_see_the_options_that_there_are() -> None:
    declared = {item.name: hint for item in fields(Options) if item.init for hint in [get_type_hints(Options)[item.name]]}
    assert get_type_hints(OptionKeywords) == declared


def test_the_page_for_newcomers_names_files_and_functions_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = [ROOT, PACKAGE, PACKAGE / "engines", ROOT / "csrc", ROOT / "csrc" / "plan", ROOT / "csrc" / "torch", ROOT / "docs"]
    named = set(re.findall(r"`([\w./-]+\.(?:py|h|cpp|cuh|cu|toml))`", page))
    assert len(named) > 30
    assert not {name for name in named if not any((folder / name).is_file() for folder in folders)}
    # such as: `ldmi_fast/evaluate.py` (`path_of`)
    functions = re.findall(r"`([\w./-]+\.py)` \(((?:`\w+`(?:, )?)+)\)", page)
    assert len(functions) >= 3
    for file, names in functions:
        code = (ROOT / file).read_text(encoding="utf-8")
        assert not [name for name in re.findall(r"`(\w+)`", names) if not re.search(rf"^(def|class)? ?{name}\b", code, re.MULTILINE)]
