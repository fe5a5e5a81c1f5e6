"""Images without a registry, and packages without an index in reach of a build: both are made of what this machine has.

The base image is this machine's Python with the libraries that it and the installed packages load, a shell of busybox,
and pip. The wheelhouse is fetched on this machine, where the index can be reached, and checked against the lock.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pip

ROOT = Path(__file__).parent.parent
FETCH_S = 600
LEFT_OUT = re.compile(
    r"/(__pycache__|test|idlelib|tkinter|lib2to3|turtledemo|site-packages|dist-packages|config-[^/]*)(/|$)"
)


def why_not() -> str | None:
    """Return why no base image can be made here, or None."""
    return (
        None if shutil.which("busybox") else "busybox-static is not installed: scripts/docker-engine --for-tests does"
    )


def fetch_wheels(folder: Path) -> None:
    """Put the locked packages into `folder`, as wheels for this Python."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "-r", ROOT / "requirements.lock", "-d", folder],
        check=True,
        timeout=FETCH_S,
    )


def make_base_image(client: docker.DockerClient, repository: str, tag: str) -> str:
    """Import the base image into this engine, and return its name."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        _pack(tar)
    client.api.import_image_from_data(
        archive.getvalue(), repository=repository, tag=tag, changes=["ENV PATH=/usr/local/bin:/bin"]
    )
    return f"{repository}:{tag}"


def _pack(tar: tarfile.TarFile) -> None:
    version = f"python3.{sys.version_info.minor}"
    interpreter = Path(sys.base_prefix, "bin", version).resolve()
    library = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix, "base": sys.base_prefix}))
    _add(tar, interpreter, f"usr/local/bin/{version}")
    for name in ("python3", "python"):
        _link(tar, f"usr/local/bin/{name}", version)
    tar.add(library, f"usr/local/lib/{version}", filter=_needed)
    tar.add(Path(pip.__file__).parent, f"usr/local/lib/{version}/site-packages/pip", filter=_plain)
    for path in _libraries([interpreter, *library.glob("lib-dynload/*.so"), *Path(sys.prefix).rglob("*.so*")]):
        # the loader is looked for at its own address, the others in the default folders
        _add(tar, path, str(path).lstrip("/") if path.name.startswith("ld-linux") else f"usr/lib/{path.name}")
    _add(tar, Path(str(shutil.which("busybox"))), "bin/busybox")
    for name in ("sh", "ls", "cat", "sleep", "id", "env"):
        _link(tar, f"bin/{name}", "busybox")
    for name, text in (("passwd", "root:x:0:0:root:/root:/bin/sh\n"), ("group", "root:x:0:\n")):
        info = tarfile.TarInfo(f"etc/{name}")
        info.size, info.mode = len(text), 0o644
        tar.addfile(info, io.BytesIO(text.encode()))
    folder = tarfile.TarInfo("tmp")
    folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
    tar.addfile(folder)


def _libraries(programs: list[Path]) -> Iterator[Path]:
    """Yield every shared library that one of these loads, and those by which glibc looks names up."""
    said = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    found = {Path(path) for path in re.findall(r"(?:=> |^\t)(/\S+) \(0x", said, re.MULTILINE)}
    own = {path for path in found if not path.is_relative_to(sys.prefix)}  # a wheel brings its others itself
    libc = next(path for path in own if path.name.startswith("libc.so"))
    yield from own | set(libc.parent.glob("libnss_[df]*.so.2"))


def _add(tar: tarfile.TarFile, path: Path, target: str) -> None:
    tar.add(path.resolve(), target, filter=_plain)


def _link(tar: tarfile.TarFile, name: str, target: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    tar.addfile(info)


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.mode |= 0o444 | (0o111 if info.mode & 0o100 else 0)
    return info


def _needed(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if LEFT_OUT.search(f"/{info.name}") else _plain(info)
