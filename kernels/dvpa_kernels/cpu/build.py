"""Compile the CPU kernels once and keep it in a cache folder.

The library has no OpenMP runtime of its own: two of them in one process would each keep a team of
threads and get in each other's way. Its symbols are those of the runtime PyTorch has loaded.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).resolve().parent
MAIN_SOURCE = SOURCE_FOLDER / "kernels.cpp"
COMPILERS = ("c++", "g++", "clang++")
COMPILE_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w"),
    *(
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
    ),
)
BUILD_SECONDS = 300  # a compiler that hangs must not hang the model


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why, in one line."""


def find_compiler() -> list[str]:
    """The compiler's command: `$CXX` (which may carry flags), else the first of COMPILERS.

    Raises:
        BuildError: there is none.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [[name] for name in COMPILERS]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    if asked:
        raise BuildError(f"CXX={asked[0]}: no such compiler")
    raise BuildError(f"no C++ compiler found (looked for {', '.join(COMPILERS)}; set CXX)")


def cache_folder() -> Path:
    """`$DVPA_CACHE`, else `$XDG_CACHE_HOME/dvpa`, else `~/.cache/dvpa`."""
    if os.environ.get("DVPA_CACHE"):
        return Path(os.environ["DVPA_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dvpa"


def build(links_openmp: bool, rebuild: bool = False) -> Path:
    """The library's path, compiled first if the cache does not hold it.

    Where the cache cannot be written, the library goes to a private temporary folder, which the
    caller deletes once it is loaded.

    Args:
        links_openmp: link the compiler's own OpenMP runtime (none is loaded yet).
        rebuild: compile even if the cache has the file (it would not load).

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = find_compiler()
    link_flags = ["-shared", "-Wl,--as-needed", *(["-fopenmp"] if links_openmp else [])]
    name = f"kernels-{_fingerprint(compiler, link_flags)}.so"
    folder = cache_folder()
    library = folder / name
    if library.is_file() and not rebuild:
        return library
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        library = Path(tempfile.mkdtemp(prefix="dvpa-")) / name
        logger.info("cache folder %s cannot be written (%s)", folder, error.strerror)
    # Not a fault, but a program that stands still for seconds says why, logs set up or not.
    logger.warning(
        "building the CPU kernels with %s (under a minute, once)", Path(compiler[0]).name
    )
    # Built beside its place and renamed: another process sees the whole file or none.
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as scratch:
        compiled, linked = Path(scratch, "kernels.o"), Path(scratch, name)
        _run([*compiler, *COMPILE_FLAGS, "-c", str(MAIN_SOURCE), "-o", str(compiled)])
        _run([*compiler, str(compiled), *link_flags, "-o", str(linked)])
        os.replace(linked, library)
    return library


def loaded_openmp() -> Path | None:
    """The OpenMP runtime this process has loaded (PyTorch's), or None."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    paths = [Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/") > 1]
    for path in paths:
        if path.name.startswith(("libgomp", "libiomp5")) and path.is_file():
            return path
    return None


def _fingerprint(compiler: list[str], link_flags: list[str]) -> str:
    """Changes with the sources, the compiler, the flags and the kind of machine."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    digest = hashlib.sha256()
    for part in (*compiler, version.stdout, *COMPILE_FLAGS, *link_flags, sys.platform):
        digest.update(part.encode() + b"\0")
    digest.update(platform.machine().encode() + b"\0" + "-".join(platform.libc_ver()).encode())
    for path in sorted(SOURCE_FOLDER.iterdir()):
        if path.suffix in {".cpp", ".h", ".inc"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def _run(command: list[str]) -> None:
    """Run one step of the build; its first error line becomes the reason of a failure."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise BuildError(f"{command[0]} failed with status {done.returncode}: {lines[0]}")
