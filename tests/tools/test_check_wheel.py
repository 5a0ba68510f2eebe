"""A wheel without a fault passes, and each planted fault is told, alone."""

from __future__ import annotations

import platform
import subprocess
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import check_wheel
import pytest

Files = dict[str, bytes]
Faults = Callable[[Files], list[str]]

MACHINE = platform.machine()
TAG = f"cp311-cp311-manylinux_2_28_{MACHINE}"
NAME = f"pyint8-{check_wheel.source_version()}"
BINARY = f"pyint8/_core.cpython-311-{MACHINE}-linux-gnu.so"
SOURCE = "int rand(void);\nint PyInit__core(void) { return rand(); }\n"


class Compiler(NamedTuple):
    folder: Path

    def __call__(self, source: str, *options: str, name: str = "binary.so") -> bytes:
        """A shared object of some C, without what the compiler would add."""
        text, out = self.folder / "source.c", self.folder / name
        text.write_text(source)
        command = [
            "cc",
            "-shared",
            "-fPIC",
            "-nostdlib",
            "-o",
            str(out),
            str(text),
            "-Wl,--no-as-needed",
            *options,
            "-lc",
        ]
        subprocess.run(command, check=True)
        return out.read_bytes()


@pytest.fixture
def compile_c(tmp_path: Path) -> Compiler:
    return Compiler(tmp_path)


def metadata(version: str) -> bytes:
    message = Message()
    for key, value in {"Metadata-Version": "2.4", "Name": "pyint8", "Version": version}.items():
        message[key] = value
    return message.as_bytes()


SCRIPTS = b"[console_scripts]\npyint8=pyint8.cli.main:main\n\n"


@pytest.fixture
def files(compile_c: Compiler) -> Files:
    """What a wheel without a fault has in it."""
    package = {name: (check_wheel.ROOT / name).read_bytes() for name in check_wheel.own_files()}
    notices = {f"{NAME}.dist-info/licenses/{name}": b"notice" for name in check_wheel.licences()}
    info = {
        "METADATA": metadata(check_wheel.source_version()),
        "WHEEL": f"Tag: {TAG}\n".encode(),
        "entry_points.txt": SCRIPTS,
    }
    infos = {f"{NAME}.dist-info/{name}": content for name, content in info.items()}
    return package | notices | infos | {BINARY: compile_c(SOURCE)}


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    """What is said of a wheel with these files."""

    def check(files: Files, tag: str = TAG) -> list[str]:
        path = tmp_path / f"{NAME}-{tag}.whl"
        record = f"{NAME}.dist-info/RECORD"
        files = {record: "".join(f"{name},,\n" for name in [record, *files]).encode()} | files
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return check_wheel.faults(path)

    return check


def test_no_fault(files: Files, faults: Faults) -> None:
    assert faults(files) == []


@pytest.mark.parametrize("stray", ["pyint8/notes.txt", "tests/test_a.py", "pyint8/__pycache__/a.pyc", "libc++.so"])
def test_a_stray_file(files: Files, faults: Faults, stray: str) -> None:
    assert faults(files | {stray: b"x"}) == [f"stray file: {stray}"]


@pytest.mark.parametrize(
    "missing",
    [
        "pyint8/py.typed",
        "pyint8/_core.pyi",
        BINARY,
        f"{NAME}.dist-info/METADATA",
        f"{NAME}.dist-info/licenses/csrc/licenses/pybind11.txt",
    ],
)
def test_a_missing_file(files: Files, faults: Faults, missing: str) -> None:
    del files[missing]
    assert faults(files) == [f"missing file: {missing}"]


def test_a_file_that_is_not_recorded(files: Files, faults: Faults) -> None:
    record = f"{NAME}.dist-info/RECORD"
    files[record] = "".join(f"{name},,\n" for name in [record, *files] if name != "pyint8/py.typed").encode()
    assert faults(files) == ["not in RECORD: pyint8/py.typed"]


def test_a_binary_of_another_python(files: Files, faults: Faults) -> None:
    other = BINARY.replace("311", "312")
    files[other] = files.pop(BINARY)
    assert faults(files) == [f"stray file: {other}", f"missing file: {BINARY}"]


def test_another_command(files: Files, faults: Faults) -> None:
    files[f"{NAME}.dist-info/entry_points.txt"] = SCRIPTS.replace(b"cli", b"run")
    (fault,) = faults(files)
    assert fault.startswith("scripts ")


def test_too_large(files: Files, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_wheel, "MOST_BYTES", 1000)
    assert [fault.split(";")[1] for fault in faults(files)] == [" 1000 are allowed"]


def test_another_version(files: Files, faults: Faults) -> None:
    files[f"{NAME}.dist-info/METADATA"] = metadata("9.9")
    (fault,) = faults(files)
    assert "of 9.9" in fault


def test_not_tagged_for_manylinux(files: Files, faults: Callable[[Files, str], list[str]]) -> None:
    tag = f"cp311-cp311-linux_{MACHINE}"
    files[f"{NAME}.dist-info/WHEEL"] = f"Tag: {tag}\n".encode()
    assert faults(files, tag) == [f"platform linux_{MACHINE}; it must be manylinux_2_28"]


def test_tagged_otherwise_inside(files: Files, faults: Faults) -> None:
    files[f"{NAME}.dist-info/WHEEL"] = f"Tag: cp310-cp310-linux_{MACHINE}\n".encode()
    (fault,) = faults(files)
    assert "WHEEL is tagged" in fault


def test_another_symbol_is_exported(files: Files, faults: Faults, compile_c: Compiler) -> None:
    files[BINARY] = compile_c(SOURCE + "int extra(void) { return 1; }\nint data = 3;\n")
    assert faults(files) == ["exports data", "exports extra"]


def test_the_init_is_hidden(files: Files, faults: Faults, compile_c: Compiler) -> None:
    files[BINARY] = compile_c(SOURCE, "-fvisibility=hidden")
    assert faults(files) == ["does not export PyInit__core"]


def test_a_library_from_outside(files: Files, faults: Faults, compile_c: Compiler, tmp_path: Path) -> None:
    compile_c("int far(void) { return 0; }", name="libfar.so")
    files[BINARY] = compile_c("int far(void);\nint PyInit__core(void) { return far(); }", f"-L{tmp_path}", "-lfar")
    assert faults(files) == ["needs libfar.so", "external library: libfar.so"]


def test_a_newer_libc(files: Files, faults: Faults, compile_c: Compiler) -> None:
    files[BINARY] = compile_c(
        'double fmod(double, double);\n__asm__(".symver fmod, fmod@GLIBC_2.38");\n'
        "int PyInit__core(void) { return (int)fmod(1.0, 2.0); }\n",
        *stub_of_newer_libm(compile_c),
    )
    (fault,) = faults(files)
    assert fault.startswith("its symbols are those of ")


def stub_of_newer_libm(compile_c: Compiler) -> list[str]:
    """A libm that has a symbol of glibc 2.38, to link with: the one here may be older."""
    versions = compile_c.folder / "versions"
    versions.write_text("GLIBC_2.38 { global: fmod; };\n")
    source = "double fmod(double a, double b) { return a + b; }"
    options = ("-fno-builtin", "-Wl,-soname,libm.so.6", f"-Wl,--version-script={versions}")
    compile_c(source, *options, name="libm.so")
    return ["-fno-builtin", f"-L{compile_c.folder}", "-lm"]


@pytest.mark.parametrize(("flag", "kind"), [("--enable-new-dtags", "DT_RUNPATH"), ("--disable-new-dtags", "DT_RPATH")])
def test_a_path_of_its_own(files: Files, faults: Faults, compile_c: Compiler, flag: str, kind: str) -> None:
    files[BINARY] = compile_c(SOURCE, f"-Wl,{flag}", "-Wl,-rpath,/opt/lib")
    assert faults(files) == [f"has an {kind}"]


def test_an_executable_stack(files: Files, faults: Faults, compile_c: Compiler) -> None:
    files[BINARY] = compile_c(SOURCE, "-Wl,-z,execstack")
    assert faults(files) == ["wants an executable stack"]


def test_the_exit_status(tmp_path: Path, files: Files, faults: Faults, capsys: pytest.CaptureFixture[str]) -> None:
    faults(files)
    wheel = str(next(tmp_path.glob("*.whl")))
    assert check_wheel.main([wheel]) == 0
    faults(files | {"stray": b""})
    assert check_wheel.main([wheel]) == 1
    assert "stray file: stray" in capsys.readouterr().out
    assert check_wheel.main([]) == 1
