"""What a wheel of pyint8 must be, looked at from outside: `check_wheel.py WHEEL...`; needs auditwheel.

Says each fault on a line of its own and exits with 1 if there is one. That the stub is equal to the binary and that the
wheel works shows only where it is installed: tests/tools/try_wheel.py.
"""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

from elftools.elf.elffile import ELFFile
from packaging.metadata import Metadata
from packaging.tags import Tag
from packaging.utils import parse_wheel_filename

_SCRIPTS = "entry_points.txt"
ROOT = Path(__file__).parents[2]
PLATFORM = "manylinux_2_28"
MOST_BYTES = 1_000_000
# Parts of the C library, which manylinux counts on.
LIBC = re.compile(r"lib(c|m|dl|rt|pthread)\.so\.\d+|ld-linux-(x86-64|aarch64)\.so\.\d+")
MACHINES = {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}


class Wheel(NamedTuple):
    path: Path
    name: str
    version: str
    tag: Tag
    files: dict[str, bytes]

    @property
    def info(self) -> str:
        """Its folder of metadata."""
        return f"{self.name}-{self.version}.dist-info"

    @property
    def machine(self) -> str:
        """The CPU of its tag, as `uname -m` says it."""
        return next((m for m in MACHINES.values() if self.tag.platform.endswith(m)), "unknown")

    @property
    def extension(self) -> str:
        """Where the binary belongs: CPython names it by the version and by "t" of a build without a lock."""
        return f"pyint8/_core.cpython-{self.tag.abi.removeprefix('cp')}-{self.machine}-linux-gnu.so"


def read(path: Path) -> Wheel:
    name, version, _, tags = parse_wheel_filename(path.name)
    with ZipFile(path) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist() if not entry.endswith("/")}
    return Wheel(path, name, str(version), min(tags, key=str), files)


def own_files() -> set[str]:
    """Of the package, as the wheel's source has them: everything but what running and building leave behind."""
    package = (ROOT / "pyint8").rglob("*")
    kept = (path for path in package if path.is_file() and path.suffix not in {".so", ".pyc"})
    return {str(path.relative_to(ROOT)) for path in kept}


def licences() -> set[str]:
    return {"LICENSE", *(f"csrc/licenses/{path.name}" for path in (ROOT / "csrc/licenses").iterdir())}


def check_contents(wheel: Wheel) -> Iterator[str]:
    """The package as it is in the source tree, one binary, the metadata and every licence; nothing else."""
    metadata = {f"{wheel.info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", _SCRIPTS)}
    notices = {f"{wheel.info}/licenses/{name}" for name in licences()}
    expected = own_files() | {wheel.extension} | metadata | notices
    yield from (f"stray file: {name}" for name in sorted(wheel.files.keys() - expected))
    yield from (f"missing file: {name}" for name in sorted(expected - wheel.files.keys()))
    if wheel.path.stat().st_size > MOST_BYTES:
        yield f"{wheel.path.stat().st_size} bytes; {MOST_BYTES} are allowed"


def check_record(wheel: Wheel) -> Iterator[str]:
    """RECORD lists every file: auditwheel looks at no other, and pip removes no other."""
    lines = wheel.files.get(f"{wheel.info}/RECORD", b"").decode().splitlines()
    recorded = {row[0] for row in csv.reader(lines)}
    yield from (f"not in RECORD: {name}" for name in sorted(wheel.files.keys() - recorded))


def source_version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "pyint8/__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("pyint8/__init__.py says no __version__")
    return found[1]


def check_metadata(wheel: Wheel) -> Iterator[str]:
    """Valid, of this version, and tagged for one Python and for manylinux alone."""
    if f"{wheel.info}/METADATA" not in wheel.files:
        return  # a missing file is told by check_contents
    metadata = Metadata.from_email(wheel.files[f"{wheel.info}/METADATA"], validate=True)
    if str(metadata.version) != source_version() or wheel.version != source_version():
        yield f"version {wheel.version} of {metadata.version}; the source says {source_version()}"
    scripts = ConfigParser(delimiters="=")
    scripts.read_string(wheel.files.get(f"{wheel.info}/{_SCRIPTS}", b"").decode())
    found = {section: dict(scripts[section]) for section in scripts.sections()}
    if found != {"console_scripts": {"pyint8": "pyint8.cli.main:main"}}:
        yield f"scripts {found}; it must be pyint8 alone, by pyint8.cli.main:main"
    if not wheel.tag.platform.startswith(PLATFORM + "_"):
        yield f"platform {wheel.tag.platform}; it must be {PLATFORM}"
    said = re.findall(rb"^Tag: (.+)$", wheel.files.get(f"{wheel.info}/WHEEL", b""), re.MULTILINE)
    if [tag.strip().decode() for tag in said] != [str(wheel.tag)]:
        yield f"WHEEL is tagged {said}, the file's name {wheel.tag}"


def elf_faults(elf: ELFFile, machine: str) -> Iterator[str]:
    """It needs libc alone, exports its init alone, finds nothing by a path of its own, and has no executable stack."""
    if MACHINES.get(elf["e_machine"]) != machine:
        yield f"the binary is of {elf['e_machine']}, the tag of {machine}"
    for entry in elf.get_section_by_name(".dynamic").iter_tags():
        if entry.entry.d_tag == "DT_NEEDED" and not LIBC.fullmatch(entry.needed):
            yield f"needs {entry.needed}"
        if entry.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
            yield f"has an {entry.entry.d_tag}"
    yield from (f"exports {name}" for name in sorted(exports(elf) - {"PyInit__core"}))
    if "PyInit__core" not in exports(elf):
        yield "does not export PyInit__core"
    if any(s["p_type"] == "PT_GNU_STACK" and s["p_flags"] & 1 for s in elf.iter_segments()):
        yield "wants an executable stack"


def exports(elf: ELFFile) -> set[str]:
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    defined = (s for s in symbols if s["st_shndx"] not in ("SHN_UNDEF", "SHN_ABS"))
    return {s.name for s in defined if s["st_info"]["bind"] in ("STB_GLOBAL", "STB_WEAK")}


def check_binary(wheel: Wheel) -> Iterator[str]:
    content = wheel.files.get(wheel.extension)
    if content is not None:
        yield from elf_faults(ELFFile(io.BytesIO(content)), wheel.machine)


def audit(path: Path) -> dict[str, Any]:
    """What auditwheel says of it; its own words go to the log.

    Raises:
        subprocess.CalledProcessError: It is no wheel with a binary.
    """
    command = [sys.executable, "-m", "auditwheel", "show", str(path)]
    print(" ".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))
    report = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(report)
    return result


def check_audit(wheel: Wheel) -> Iterator[str]:
    """auditwheel finds no library from outside, and the symbols of libc no newer than the tag."""
    if wheel.extension not in wheel.files:
        return
    report = audit(wheel.path)
    yield from (f"external library: {name}" for name in report["external_libs"])
    found = re.match(r"manylinux_(\d+)_(\d+)_", report["sym_tag"] or "")
    if found is None or tuple(map(int, found.groups())) > tuple(map(int, PLATFORM.split("_")[1:])):
        yield f"its symbols are those of {report['sym_tag']}"


CHECKS = (check_contents, check_record, check_metadata, check_binary, check_audit)


def faults(path: Path) -> list[str]:
    """All that is wrong with a wheel, in words."""
    wheel = read(path)
    return [fault for check in CHECKS for fault in check(wheel)]


def main(paths: list[str]) -> int:
    found = [f"{Path(path).name}: {fault}" for path in paths for fault in faults(Path(path))]
    print("\n".join(found) or f"{len(paths)} wheels, no fault")
    return 1 if found or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
