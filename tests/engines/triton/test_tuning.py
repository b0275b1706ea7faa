"""The table of configurations and the cache of measurements; the device and the clock are made up."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ldmi_fast.engines.triton import tuning

REGIME = "joint-tile-16"
SLOW, FAST = list(tuning.TABLE[REGIME])[:2]


class OnGpu:
    """The attributes of a tensor on a GPU that tuning reads."""

    is_cuda = True
    dtype = torch.float32
    shape = (1000, 14)
    device = torch.device("cuda", 0)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Turn autotuning on, on a made-up device; returns the list of measurements, in order. The second configuration is the fastest."""
    pytest.importorskip("triton")
    names: list[str] = []
    properties = types.SimpleNamespace(name="a made-up GPU", multi_processor_count=3)
    monkeypatch.setenv(tuning.VARIABLE, "1")
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_remembered", {})
    monkeypatch.setattr(importlib.import_module("ldmi_fast.engines.triton.launch"), "has_data", lambda tensor: True)

    def measure(run: Any) -> float:
        run()
        return 1.0 if names[-1] == FAST else 2.0

    monkeypatch.setattr(tuning, "measure", measure)
    return names


def choose(names: list[str], monkeypatch: pytest.MonkeyPatch | None = None) -> str:
    by_config = {config: name for name, config in tuning.TABLE[REGIME].items()}
    return by_config[tuning.choose(REGIME, OnGpu(), lambda config: names.append(by_config[config]))]  # type: ignore[arg-type]


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start as another process would."""
    monkeypatch.setattr(tuning, "_remembered", {})


def test_off_by_default(monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    for value in (None, "", "0"):
        if value is None:
            monkeypatch.delenv(tuning.VARIABLE)
        else:
            monkeypatch.setenv(tuning.VARIABLE, value)
        assert choose(measured) == SLOW
    assert measured == []
    monkeypatch.setenv(tuning.VARIABLE, "yes")
    with pytest.raises(ValueError, match="LDMI_FAST_AUTOTUNE must be 0 or 1, got 'yes'"):
        choose(measured)


def test_measured_once_and_remembered_on_disk(monkeypatch: pytest.MonkeyPatch, measured: list[str], tmp_path: Path) -> None:
    assert choose(measured) == FAST
    assert measured == list(tuning.TABLE[REGIME])
    assert choose(measured) == FAST
    forget(monkeypatch)
    assert choose(measured) == FAST
    assert len(measured) == len(tuning.TABLE[REGIME])
    (file,) = (tmp_path / "triton").iterdir()
    found = json.loads(file.read_text())
    assert found["config"] == FAST
    assert "a made-up GPU" in found["key"]


def test_another_device_type_or_size_is_another_measurement(monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    keys = {tuning.describe(REGIME, OnGpu())}  # type: ignore[arg-type]
    for name, value in (("dtype", torch.bfloat16), ("shape", (1025, 14)), ("shape", (1000, 13))):
        with monkeypatch.context() as patch:
            patch.setattr(OnGpu, name, value)
            keys.add(tuning.describe(REGIME, OnGpu()))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(name="B", multi_processor_count=3))
    keys.add(tuning.describe(REGIME, OnGpu()))  # type: ignore[arg-type]
    assert len(keys) == 5


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', '{"config": "64-rows"}', '{"key": "another", "config": "64-rows"}', "\x00\xff", "no such"]
)
def test_damaged_files_are_measured_again(text: str, monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    key = tuning.describe(REGIME, OnGpu())  # type: ignore[arg-type]
    path = tuning.path_of(key)
    path.parent.mkdir(parents=True)
    if text == "no such":
        text = json.dumps({"key": key, "config": "a configuration of another version"})
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="measuring again"):
        assert choose(measured) == FAST
    assert json.loads(path.read_text())["config"] == FAST


def test_nothing_is_measured_during_capture(monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose(measured) == SLOW
        assert measured == []
    assert choose(measured) == FAST, "and what capture took is not remembered"


def test_nothing_is_measured_on_tensors_without_data(monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    """As torch.compile passes them."""
    monkeypatch.undo()
    launch = pytest.importorskip("ldmi_fast.engines.triton.launch")
    tensor = torch.zeros(3)
    assert launch.has_data(tensor)
    assert launch.has_data(torch.nn.Parameter(tensor))
    with FakeTensorMode() as mode:
        assert not launch.has_data(mode.from_tensor(tensor))
    seen: list[bool] = []

    def step(x: Tensor) -> Tensor:
        seen.append(launch.has_data(x))
        return x + 1

    torch.func.functionalize(step)(tensor)
    make_fx(step, tracing_mode="fake")(tensor)
    assert seen[-1] is False


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, measured: list[str], tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(blocked))
    with pytest.warns(UserWarning, match="lasts for this process only"):
        assert choose(measured) == FAST
    assert choose(measured) == FAST
    assert len(measured) == len(tuning.TABLE[REGIME])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write to every folder")
def test_a_read_only_folder(monkeypatch: pytest.MonkeyPatch, measured: list[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.warns(UserWarning, match="lasts for this process only"):
            assert choose(measured) == FAST
    finally:
        tmp_path.chmod(0o700)


def _write(folder: str, name: str, times: int) -> None:
    os.environ[tuning.CACHE_VARIABLE] = folder
    for _ in range(times):
        tuning.save("a key", name, {name: 1.0})


def test_concurrent_writers_never_leave_half_a_file(measured: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(str(tmp_path), name, 200)) for name in (SLOW, FAST)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(tuning.load(REGIME, "a key"))  # a warning would be half a file, and fails below
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen <= {None, SLOW, FAST}
    assert tuning.load(REGIME, "a key") in (SLOW, FAST)
    assert [path.suffix for path in (tmp_path / "triton").iterdir()] == [".json"], "temporary files are gone"
