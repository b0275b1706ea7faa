"""Builds and runs the native C++ programs, which test the CPU kernels without torch and Python: fuzzed against plain loops, with
release flags and under sanitizers.

The sanitized build is -O0: its own code is slow, but it compiles in half the time, and compiling dominates. Every buffer that the
programs hand to the kernels is exactly as large as the contract says, so that an access one element too far is found.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.csrc import programs

BUILDS = {
    "release": {},
    "sanitized": {"CMAKE_BUILD_TYPE": "None", "CMAKE_CXX_FLAGS": "-O0", "LDMI_SANITIZE": "address,undefined"},
}
CASES = {"release": 400, "sanitized": 150}
ISAS = ["baseline", "avx2", "avx512"]

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="the programs are built on Linux")


@pytest.fixture(scope="module", params=BUILDS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a build, and the folder of its programs."""
    name: str = request.param
    return name, programs.build(tmp_path_factory.mktemp(name), BUILDS[name])


def fuzz(folder: Path, isa: str, seed: int, cases: int) -> str:
    """Run the fuzzer and return its output. "wide" is the source of the 64-byte vectors, lowered to whatever this machine has."""
    wide = isa == "wide"
    command = [str(folder / "fuzz"), *(["--wide"] if wide else []), str(seed), str(cases)]
    return programs.run(command, isa="" if wide else isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [*ISAS, "wide"])
def test_fuzz(built: tuple[str, Path], isa: str) -> None:
    """joint, logits_grad and the whole loss on random batches; the same bits on every schedule of their tasks."""
    name, folder = built
    output = fuzz(folder, isa, 20190903, CASES[name])
    assert output.startswith(f"{isa}: {CASES[name]} cases agree")
    seen = programs.counts(output)
    assert all(seen.values()), f"a regime was not reached: {seen}"
    assert seen["losses"] >= CASES[name] / 5, "too few joints were far enough from singular to compare the loss"


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_logdet_inverse(built: tuple[str, Path], isa: str) -> None:
    name, folder = built
    output = programs.run([str(folder / "logdet"), "7", str(3 * CASES[name])], isa=isa)
    assert output == f"{isa}: {3 * CASES[name]} matrices agree\n"


@pytest.mark.slow
def test_half(built: tuple[str, Path]) -> None:
    assert programs.run([str(built[1] / "half")]) == "half: all patterns agree\n"


@pytest.mark.slow
@pytest.mark.parametrize("isa", [*ISAS, "wide"])
def test_simd(built: tuple[str, Path], isa: str) -> None:
    """exp and log within 1.5 units in the last place, reductions, transpositions, at every vector width."""
    _, folder = built
    fuzz(folder, isa, 0, 0)  # skips where the machine lacks it
    output = programs.run([str(folder / f"simd_{isa}")])
    assert output.count(f"{isa}: exp of") == output.count(f"{isa}: log of") == 2


@pytest.mark.slow
def test_unknown_isa(built: tuple[str, Path]) -> None:
    """An instruction set that does not exist is refused, with the names of those that exist."""
    done = programs.execute([str(built[1] / "logdet"), "0", "0"], isa="sse9")
    assert done.returncode == 3
    assert "LDMI_FAST_ISA=sse9: expected one of" in done.stderr
    assert "baseline" in done.stderr
