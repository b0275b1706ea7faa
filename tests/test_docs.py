"""The documents are right: their examples run and print what the text says, their links and commands exist."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

import ldmi_fast

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "bench" / "results").glob("gpu-*/README.md")),
]
# A ```python block, and the ```text block right after it if there is one: what the example prints.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
GPU_RESULTS = sorted((ROOT / "bench" / "results").glob("gpu-*/summary.json"))
# A claim that all tests passed.
ALL_PASSED = re.compile(r"\b(?:pass(?:es|ed)?|passing) (?:(?:the|its|their|all|every one of) )*tests?\b")


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
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("document", "line", "source", "expected"), examples())
def test_examples_run_and_print_what_they_say(
    document: Path, line: int, source: str, expected: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices are slower on several threads, and much slower on a busy machine
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
    assert options
    for option, default in options.items():
        row = re.search(rf"^\| `{option}` \| (.*?) \|", text, flags=re.MULTILINE)
        assert row, f"README.md has no row for the option {option}"
        if option != "engine":
            shown = f'"{default}"' if isinstance(default, str) else str(default)
            assert row[1] == f"`{shown}`", f"README.md says {option} is {row[1]} by default, it is {shown}"


def test_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(ldmi_fast.__version__)}\] - ", text, flags=re.MULTILINE)


# --- what the documents say about a run on a GPU is what its summary.json says ------------------------------------------------


def outcomes(summary: Path) -> dict[str, dict[str, int]]:
    """For each part that ran tests, how many passed, failed and so on, from the last line that pytest wrote."""
    found = {}
    for part in json.loads(summary.read_text(encoding="utf-8"))["parts"]:
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", part["last_line"])}
        if "passed" in counts:
            found[part["part"]] = counts
    return found


def sentences(text: str) -> list[str]:
    """Sentences, rows of tables and items of lists, each on one line."""
    blocks = re.split(r"\n\s*\n|\n(?=\s*[-|])", text)
    return [sentence for block in blocks for sentence in re.split(r"(?<=[.:;])\s+", " ".join(block.split()))]


def wrong_claims(text: str, tests: dict[str, dict[str, int]]) -> list[str]:
    """The wrong claims of ``text`` about a run on a GPU: that all tests passed although some failed, or a wrong number."""
    failed = sum(counts.get("failed", 0) + counts.get("errors", 0) + counts.get("error", 0) for counts in tests.values())
    wrong = []
    for sentence in sentences(text):
        if failed and re.search(r"\b(?:GPU|H100)\b", sentence) and ALL_PASSED.search(sentence) and "emulator" not in sentence:
            wrong.append(f"{failed} tests failed, but: {sentence}")
    for word in ("passed", "failed", "skipped"):
        numbers = {counts.get(word, 0) for counts in tests.values()}
        said = {int(number) for number in re.findall(rf"\b(\d+) (?:tests )?{word}\b", text)}
        wrong += [f"says {number} {word}, the file {sorted(numbers)}" for number in sorted(said - numbers)]
        if word == "failed":
            wrong += [f"leaves out that {number} {word}" for number in sorted(numbers - said - {0})]
    return wrong


def test_the_record_of_the_gpu_is_read() -> None:
    assert GPU_RESULTS
    for summary in GPU_RESULTS:
        tests = outcomes(summary)
        assert {"tests", "triton"} <= set(tests)
        assert all(counts["passed"] > 0 for counts in tests.values())


def all_outcomes() -> dict[str, dict[str, int]]:
    return {f"{path.parent.name} {part}": counts for path in GPU_RESULTS for part, counts in outcomes(path).items()}


@pytest.mark.parametrize("summary", GPU_RESULTS, ids=lambda path: path.parent.name)
def test_results_say_which_tests_failed(summary: Path) -> None:
    assert not wrong_claims(prose(summary.parent / "README.md"), outcomes(summary))


def test_readme_says_how_the_tests_ended_on_a_gpu() -> None:
    assert not wrong_claims(prose(ROOT / "README.md"), all_outcomes())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_no_document_says_that_all_tests_passed_where_some_failed(document: Path) -> None:
    wrong = [claim for claim in wrong_claims(prose(document), all_outcomes()) if "tests failed, but:" in claim]
    assert not wrong


def test_wrong_claims_are_found() -> None:
    tests = {"tests": {"passed": 20, "failed": 3}, "triton": {"passed": 7}}
    honest = "A GPU has run it: 20 tests passed and 3 failed. No GPU has run the rest; it passes its tests under the emulator."
    assert wrong_claims(honest, tests) == []
    assert len(wrong_claims("On an H100 the kernels passed\nthe tests, and 3 failed.", tests)) == 1
    assert len(wrong_claims("21 passed, 3 failed", tests)) == 1
    assert len(wrong_claims("20 passed", tests)) == 1
    assert wrong_claims("On an H100 the kernels passed the tests.", {"tests": {"passed": 20}}) == []
