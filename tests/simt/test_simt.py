"""The CUDA kernels on the CPU: every case under random schedules, with and without sanitizers, and the proof that this finds bugs."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from tests.simt import programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="the programs are built on Linux"),
]

CASES = [name for name in programs.cases() if name != "demo"]

#: Seeds per case: (release, sanitized)
ITERATIONS = {
    "example": (300, 30),
    "conformance": (60, 8),
    "logdet_inverse": (400, 40),
    "fused": (400, 40),
    "loss_forward": (200, 20),
}
OTHERWISE = (100, 10)

#: For each defect of demo.cu: the least share of the seeds that must find it, and the reason that they must give. The share is small
#: where most schedules hide the defect, as they would on a GPU.
DEFECTS = {
    "transpose no-barrier": (0.95, "transpose: value"),
    "transpose no-second-barrier": (0.95, "transpose: value"),
    "transpose skipped-write": (0.95, "is -?nan"),
    "transpose read-past-end": (0.95, "load of 4 bytes .*(out of bounds|past the end of in)"),
    "transpose write-past-end": (0.95, "store of 4 bytes .*(out of bounds|past the end of out)"),
    "transpose shared-past-end": (0.95, "wrote outside its shared memory"),
    "transpose unstored": (0.95, "value 0 of out was never written"),
    "reduce no-barrier": (0.3, "is -?nan"),
    "reduce divergent-collective": (0.95, "deadlock|waits at shfl_xor|has ended"),
    "reduce divergent-barrier": (0.95, "wait at sync_block|threads of its block have ended"),
    "reduce early-exit": (0.95, "has ended|have ended|the thread ended while"),
    "reduce misaligned": (0.95, "misaligned load of 16 bytes"),
    "reduce too-little-shared": (0.95, "takes shared memory up to byte"),
    "last-block no-fence": (0.9, "sum: value|no thread has written"),
    "last-block no-reset": (0.95, "value 0 of out was never written"),
    "pipeline no-wait": (0.95, "is -?nan"),
    "pipeline waits-for-too-few": (0.95, "is -?nan"),
    "pipeline no-barrier": (0.95, "is -?nan"),
    "pipeline no-second-barrier": (0.95, "is -?nan|pipeline: value"),
    "pipeline read-past-end": (0.95, "copy_async of 16 bytes .*(out of bounds|past the end of in)"),
    "exchange no-barrier": (0.9, "exchange: value"),
    "exchange no-second-barrier": (0.9, "exchange: value"),
    "two-phases no-barrier": (0.95, "two_phases: value|no thread has written"),
    "two-phases not-cooperative": (0.95, "sync_grid in a grid that is not cooperative"),
    "two-phases read-only-load": (0.95, "read-only load of 4 bytes .* which this launch has written"),
    "sort no-barrier": (0.95, "order|total"),
    "sort no-second-barrier": (0.15, "order"),
    "sort no-warp-sync": (0.95, "order"),
    "sort not-atomic": (0.95, "total: value"),
}
RIGHT = {"transpose", "reduce", "last-block", "pipeline", "exchange", "two-phases", "sort"}

#: The accesses of 16 bytes of global memory in the PTX of conformance.cu's `move`, which uses every form.
VECTORS = {
    "ld.global.v4.u32",
    "ld.global.nc.v4.u32",
    "ld.global.nc.L1::no_allocate.v4.u32",
    "st.global.v4.u32",
    "st.global.cs.v4.u32",
}


def wanted(session: pytest.Session) -> list[str]:
    """The programs that the selected tests use, so that ``-k`` builds no others."""
    names = {item.callspec.params.get("case", "demo") for item in session.items if hasattr(item, "callspec")}
    return sorted((names | {"demo"}) & set(programs.cases()))


@pytest.fixture(scope="module", params=programs.BUILDS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a build, and the folder of its programs."""
    name: str = request.param
    return name, programs.build(tmp_path_factory.mktemp(name), programs.BUILDS[name], wanted(request.session))


@pytest.mark.parametrize("case", CASES)
def test_case(built: tuple[str, Path], case: str) -> None:
    name, folder = built
    seeds = ITERATIONS.get(case, OTHERWISE)[name == "sanitized"]
    output = programs.run([str(folder / case), "--seed", "1", "--iterations", str(seeds)])
    assert output.endswith(f"{case}: {seeds} seeds pass\n")


def test_right_kernels_pass(built: tuple[str, Path]) -> None:
    """In the kernels without defects nothing is found, whatever the seed."""
    name, folder = built
    seeds = {"release": 150, "sanitized": 10}[name]
    output = programs.run([str(folder / "demo"), "--right", "--seed", "1000", "--iterations", str(seeds)])
    found = dict(re.findall(r"^([a-z-]+): found (\d+) of", output, re.MULTILINE))
    assert found == dict.fromkeys(RIGHT, "0")


def test_defects_are_found(built: tuple[str, Path]) -> None:
    """The emulator alone finds each defect, and gives the right reason."""
    name, folder = built
    if name != "release":
        pytest.skip("AddressSanitizer ends the process at the first defect")
    seeds = 60
    output = programs.run([str(folder / "demo"), "--iterations", str(seeds)])
    lines = {line.split(": ")[0]: line for line in output.splitlines()}
    assert lines.keys() == DEFECTS.keys() | RIGHT
    missed = []
    for defect, (share, reason) in DEFECTS.items():
        match = re.fullmatch(rf"{defect}: found (\d+) of {seeds}: (.*)", lines[defect])
        assert match is not None
        if int(match[1]) < share * seeds or not re.search(reason, match[2]):
            missed.append(lines[defect])
    assert not missed, "\n".join(missed)


@pytest.mark.parametrize("defect", ["plain-pointer", "shared-past-end"])
def test_address_sanitizer(built: tuple[str, Path], defect: str) -> None:
    """AddressSanitizer knows the pieces of shared memory, and that global memory is for load() and store()."""
    name, folder = built
    if name != "sanitized":
        pytest.skip("needs AddressSanitizer")
    done = programs.execute([str(folder / "demo"), "--only", f"transpose {defect}", "--iterations", "1"])
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert "transpose<" in done.stderr


def test_failures_are_not_silent(built: tuple[str, Path]) -> None:
    """A case that fails names its seed and exits with 1; the same seed fails again, in the same way."""
    name, folder = built
    if name != "release":
        pytest.skip("once is enough")
    command = [str(folder / "demo"), "--only", "reduce divergent-collective", "--iterations", "1", "--seed", "7"]
    first, again = programs.run(command), programs.run(command)
    assert first == again
    assert "(seed 7)" in first


@pytest.mark.parametrize("case", ["conformance"])
def test_nvcc(case: str, tmp_path: Path) -> None:
    """nvcc takes the same source, for every architecture, without a warning; 16-byte accesses of global memory stay one."""
    nvcc = programs.tool("nvcc")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a", "100", "120")]
    options = ["-std=c++20", "-Werror", "all-warnings", "--threads", "2", "-fatbin", "--keep", "--keep-dir", str(tmp_path)]
    source = str(programs.FOLDER / f"{case}.cu")
    programs.run([nvcc, *options, *targets, source, "-o", str(tmp_path / "out.fatbin")])
    listings = sorted(tmp_path.glob("*.ptx"))
    assert len(listings) == len(targets)
    for listing in listings:
        move = re.search(r"^\.entry \w+4moveIfEE\w+\(.*?^}", listing.read_text(), re.DOTALL | re.MULTILINE)
        assert move is not None, listing.name
        accesses = set(re.findall(r"\b((?:ld|st)\.global\S*)", move[0]))
        assert {name for name in accesses if ".v4" in name} == VECTORS, listing.name
        assert not {name for name in accesses if name.endswith(("8", "16"))}, listing.name
