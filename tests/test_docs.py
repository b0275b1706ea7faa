"""The documents keep their word: their examples run and print what they say, their links and commands exist."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import ldmi_fast

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# A ```python block, and the ```text block right after it if there is one: what the example prints.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def examples() -> list[object]:
    found: list[object] = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in EXAMPLE.finditer(text):
            line = text.count("\n", 0, match.start()) + 2
            found.append(pytest.param(document, line, *match.groups(), id=f"{document.stem}-line-{line}"))
    return found


def prose(document: Path) -> str:
    """The text of a document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and its kin make them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("document", "line", "source", "expected"), examples())
def test_examples_run_and_print_what_they_say(
    document: Path, line: int, source: str, expected: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices are slower on several threads, very much so on a busy machine
    try:
        # the blank lines make a traceback show the document's line numbers
        exec(compile("\n" * (line - 1) + source, str(document), "exec"), {"__name__": "__example__"})
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    if expected is None:
        return
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", expected)
    for got, said in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
        assert math.isclose(float(got), float(said), rel_tol=0.05), f"prints {got}, the document says {said}"


def test_there_are_examples() -> None:
    assert sum("```python" in document.read_text(encoding="utf-8") for document in DOCUMENTS) >= 3
    assert len(examples()) >= 7


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file), f"{document.name} links to {target}, but {file.name} has no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^|\$ )make ([a-z][a-z-]*)", text, flags=re.MULTILINE))
    assert named <= targets, f"{document.name} names make targets that do not exist: {sorted(named - targets)}"


def test_readme_has_the_whole_api() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in ldmi_fast.__all__ if not name.startswith("_") and name not in text]
    assert not missing, f"README.md does not name {missing}"
    options = ldmi_fast.DMILoss.__init__.__kwdefaults__
    for option, default in options.items():
        row = re.search(rf"^\| `{option}` \| (.*?) \|", text, flags=re.MULTILINE)
        assert row, f"README.md has no row for the option {option}"
        if option != "engine":
            shown = f'"{default}"' if isinstance(default, str) else str(default)
            assert row[1] == f"`{shown}`", f"README.md says {option} is {row[1]} by default, it is {shown}"


def test_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(ldmi_fast.__version__)}\] - ", text, flags=re.MULTILINE)
