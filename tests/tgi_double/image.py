"""Packs the double into an image: no registry, no download, nothing built in a container.

    python -m tests.tgi_double.image        prints its tag

The image holds the interpreter that runs this, its standard library without what a server needs least, the shared
libraries of both, and the double under TGI's two names. The tag is the hash of what it is made from, so one that is
there already is up to date.
"""

from __future__ import annotations

import hashlib
import io
import json
import py_compile
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.docker_engine import ENGINE_URL, connect

REPOSITORY = "tgi-gateway-double"
PROGRAM = Path(__file__).parent
STDLIB = Path(sysconfig.get_path("stdlib"))
EXTENSIONS = STDLIB / "lib-dynload"
TOOLS = {"conftest.py", "image.py", "process.py", "schemas.py"}
BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "cat", "env", "ls", "sleep")

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
LIBRARIES = "usr/local/lib"
LOADED_FIRST = "import encodings.idna, traceback, tgi_double.launcher"
"""What a double imports sooner or later: compiled ahead, as a read-only root keeps no compiled files."""
LEFT_OUT = {
    *("__pycache__", "site-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3"),
    *("pydoc_data", "distutils", "unittest", "lib-dynload", "venv", "sqlite3", "curses"),
}
EXTENSIONS_LEFT_OUT = ("_test", "_xx", "xx", "_ctypes_test", "_tkinter", "_ssl", "_hashlib", "_sqlite3", "_curses")
"""Without `_ssl`, asyncio does not load OpenSSL, which takes half of the time that a start takes."""

ENTRY = """\
#!/usr/local/bin/{python} -IS
import sys
sys.path.insert(0, "/{libraries}")
from tgi_double.launcher import main
sys.exit(main(sys.argv[1:]))
"""
CHANGES = [
    'ENTRYPOINT ["text-generation-launcher"]',
    "ENV PORT=80 HF_HOME=/data PATH=/usr/local/bin:/usr/bin:/bin LD_LIBRARY_PATH=/usr/local/lib",
    'LABEL "tgi-gateway.read-only"="true"',
]


def build(url: str = ENGINE_URL) -> str:
    """Return the tag of the image, which is there when this returns.

    Raises:
        DockerException: no engine answers there, or it does not take the image.
    """
    name = tag()
    client = connect(url)
    try:
        if not client.images.list(name):
            repository, _, version = name.partition(":")
            client.api.import_image_from_data(packed(), repository=repository, tag=version, changes=CHANGES)
    finally:
        client.close()
    return name


def tag() -> str:
    """Return the name of an image of this program, this interpreter and this machine's shell, built or not."""
    inputs = hashlib.sha256(f"{sys.version} {sys.base_prefix} {BUSYBOX.exists()}".encode())
    for source in (Path(__file__), *sources()):
        inputs.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return f"{REPOSITORY}:{inputs.hexdigest()[:16]}"


def sources() -> list[Path]:
    """Return the files of the double itself."""
    return sorted(path for path in PROGRAM.glob("*.py") if path.name not in TOOLS and not path.name.startswith("test_"))


def packed() -> bytes:
    """Return the image's file system as a tar archive."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        _add_interpreter(tar)
        _add_program(tar)
        _add_shell(tar)
        for name in ("data", "tmp"):
            _add_directory(tar, name)
        _add(tar, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\n")
    return archive.getvalue()


def _add_interpreter(tar: tarfile.TarFile) -> None:
    interpreter = Path(sys.executable).resolve()
    extensions = [path for path in EXTENSIONS.glob("*.so") if not path.name.startswith(EXTENSIONS_LEFT_OUT)]
    tar.add(interpreter, f"usr/local/bin/{PYTHON}")
    for path in STDLIB.iterdir():
        if path.name not in LEFT_OUT and not path.name.startswith("config-"):
            tar.add(path, f"{LIBRARIES}/{PYTHON}/{path.name}", filter=_kept)
    for path in extensions:
        tar.add(path, f"{LIBRARIES}/{PYTHON}/lib-dynload/{path.name}")
    for path in _shared_libraries([interpreter, *extensions]):
        is_loader = path.name.startswith("ld-linux")  # its place is written into every program
        tar.add(path.resolve(), str(path).lstrip("/") if is_loader else f"{LIBRARIES}/{path.name}")


def _kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if Path(member.name).name in LEFT_OUT else member


def _shared_libraries(programs: list[Path]) -> set[Path]:
    """Return what the dynamic linker would load for these, itself included."""
    listed = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=True).stdout
    words = (word for line in listed.splitlines() if line.startswith("\t") for word in line.split())
    return {Path(word) for word in words if word.startswith("/")}


def _add_program(tar: tarfile.TarFile) -> None:
    for source in sources():
        tar.add(source, f"{LIBRARIES}/{PROGRAM.name}/{source.name}")
    entry = ENTRY.format(python=PYTHON, libraries=LIBRARIES).encode()
    for name in ("text-generation-launcher", "text-generation-server"):
        _add(tar, f"usr/local/bin/{name}", entry, mode=0o755)
    with tempfile.TemporaryDirectory() as place:
        for source, name in _loaded_modules():
            compiled = Path(place, "compiled.pyc")
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(str(source), str(compiled), dfile=f"/{name}", doraise=True, invalidation_mode=mode)
            cached = Path(name).parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc"
            _add(tar, str(cached), compiled.read_bytes())


def _loaded_modules() -> Iterator[tuple[Path, str]]:
    """Yield the source of every module that the double loads, and its name in the image."""
    script = (
        f"import sys, json; sys.path.insert(0, {str(PROGRAM.parent)!r}); {LOADED_FIRST}; "
        "print(json.dumps([getattr(m, '__file__', None) for m in list(sys.modules.values())]))"
    )
    listed = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    roots = {PROGRAM: f"{LIBRARIES}/{PROGRAM.name}", STDLIB: f"{LIBRARIES}/{PYTHON}"}
    for path in {Path(name) for name in json.loads(listed.stdout) if name and name.endswith(".py")}:
        for root, place in roots.items():
            if path.is_relative_to(root):
                yield path, f"{place}/{path.relative_to(root)}"


def _add_shell(tar: tarfile.TarFile) -> None:
    if not BUSYBOX.exists():
        return
    tar.add(BUSYBOX.resolve(), "bin/busybox")
    for applet in APPLETS:
        link = tarfile.TarInfo(f"bin/{applet}")
        link.type, link.linkname = tarfile.SYMTYPE, "busybox"
        tar.addfile(link)


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    tar.addfile(member, io.BytesIO(data))


def _add_directory(tar: tarfile.TarFile, name: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, 0o1777
    tar.addfile(member)


if __name__ == "__main__":
    print(build())  # noqa: T201
