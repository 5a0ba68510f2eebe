"""Where a build gets its GPU kernels from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import build_backend
import compile_kernels
import pytest

ROOT = Path(compile_kernels.__file__).parent.parent
KERNELS = ROOT / "csrc/core/device/kernels.cu"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of kernels.cu where it finds its headers."""
    shutil.copytree(ROOT / "csrc/core", tmp_path / "core")
    return tmp_path / "core/device/kernels.cu"


def prebuilt_of(source: Path) -> Path:
    path = source.with_name("prebuilt.cpp")
    path.write_text(compile_kernels.as_source({0: b"ptx"}, compile_kernels.digest(source)))
    return path


def test_kernels_of_these_sources_are_taken(source: Path, tmp_path: Path) -> None:
    prebuilt, output = prebuilt_of(source), tmp_path / "out.cpp"
    assert compile_kernels.main([str(source), str(output), "--prebuilt", str(prebuilt)]) == 0
    assert output.read_bytes() == prebuilt.read_bytes()


@pytest.mark.parametrize("changed", ["kernels.cu", "kernel_tile.hpp"])
def test_kernels_of_other_sources_are_not(source: Path, changed: str) -> None:
    prebuilt = prebuilt_of(source)
    with source.with_name(changed).open("a") as file:
        file.write("// another\n")
    assert not compile_kernels.is_current(prebuilt, source)


def test_nothing_prebuilt(source: Path) -> None:
    assert not compile_kernels.is_current(source.with_name("nothing"), source)


def test_without_a_compiler(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_kernels, "packaged_nvrtc", lambda: None)
    monkeypatch.setattr(compile_kernels, "toolkit_nvrtc", lambda: None)
    assert compile_kernels.main([str(source), str(tmp_path / "out.cpp")]) == 3
    assert "std::array<KernelImage, 0>" in (tmp_path / "out.cpp").read_text()


@pytest.mark.parametrize("place", ["lib64", "lib", "targets/sbsa-linux/lib"])
@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "PREFIX"])
def test_the_library_of_a_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, place: str) -> None:
    for name in compile_kernels._TOOLKITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    library = tmp_path / place / "libnvrtc.so.12"
    library.parent.mkdir(parents=True)
    library.touch()
    assert compile_kernels.toolkit_nvrtc() == library


@pytest.mark.parametrize(("machine", "required"), [("x86_64", True), ("aarch64", True), ("riscv64", False)])
def test_what_a_clone_requires(monkeypatch: pytest.MonkeyPatch, machine: str, required: bool) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(build_backend.platform, "machine", lambda: machine)
    monkeypatch.setattr(compile_kernels, "is_current", lambda prebuilt, source: False)
    assert bool(build_backend._compiler()) == required


def test_what_a_source_distribution_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_kernels, "is_current", lambda prebuilt, source: True)
    assert build_backend._compiler() == []


def configure(folder: Path, kernels: str, *options: str) -> subprocess.CompletedProcess[str]:
    """CMake's configuration of the core with an interpreter that has no packages, so no NVRTC."""
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DPYINT8_KERNELS={kernels}", "-DPYINT8_BUILD_MODULE=OFF"]
    return subprocess.run([*command, *options], capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.skipif(compile_kernels.toolkit_nvrtc() is not None, reason="this machine has a CUDA toolkit")
@pytest.mark.parametrize(("kernels", "status"), [("ON", 1), ("AUTO", 0), ("OFF", 0)])
def test_cmake_without_a_compiler(tmp_path: Path, kernels: str, status: int) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    done = configure(tmp_path / "build", kernels, f"-DPython_EXECUTABLE={bare}")
    assert done.returncode == status, done.stderr
    told = "nothing here compiles the GPU kernels" in " ".join(done.stderr.split())
    assert told == (kernels != "OFF")


@pytest.mark.parametrize("option", ["auto", "yes", ""])
def test_cmake_refuses_other_values(tmp_path: Path, option: str) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    done = configure(tmp_path, option)
    assert done.returncode != 0
    assert "PYINT8_KERNELS" in done.stderr
