"""Folders that are complete or absent, and files that are on the disk once written; no PyTorch."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

INCOMPLETE_MARK = ".dvpa-incomplete"
PARTIAL = ".partial"  # ends the name of a file that is being written


@contextmanager
def staged_folder(out: Path, keep: bool = False) -> Iterator[Path]:
    """A folder to fill beside `out`, renamed to `out` at the end: `out` is absent or complete.

    A killed run leaves `<out>.incomplete` behind, which the next one removes; with `keep`, so does
    one that failed, and the next one finds it as it was left.

    Raises:
        ValueError: `out` holds files already, or `<out>.incomplete` is not one of ours.
        OSError: the disk is full or fails; with a file name, of the folder if nothing better.
    """
    out, staging = _staging_of(out)
    if staging.exists() and not keep:
        shutil.rmtree(staging)
    staging.mkdir(parents=True, exist_ok=keep)
    (staging / INCOMPLETE_MARK).touch()
    try:
        yield staging
        (staging / INCOMPLETE_MARK).unlink()
        sync_folder(staging)
        staging.replace(out)  # atomic, also over an empty folder
        sync_folder(out.parent)
    except BaseException as error:
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)
        _raise_with_name(error, out)
        raise


@contextmanager
def resumable_folder(out: Path, identity: str) -> Iterator[Path]:
    """`staged_folder` whose work outlives a kill or a failure.

    A run of the same `identity` finds the staging folder as the last one left it; a run of another
    one finds it empty. One run at a time. A failure that leaves nothing in it removes it.

    Raises:
        ValueError: as `staged_folder`, or another run is at it.
    """
    out, staging = _staging_of(out)
    staging.mkdir(parents=True, exist_ok=True)
    with (staging / INCOMPLETE_MARK).open("a+") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{staging}: another run is writing it") from None
        mark.seek(0)
        if mark.read() != identity:
            _clear(staging)
            mark.truncate(0)
            mark.write(identity)
            mark.flush()
            os.fsync(mark.fileno())
        try:
            yield staging
        except BaseException as error:
            if [path.name for path in staging.iterdir()] == [INCOMPLETE_MARK]:
                shutil.rmtree(staging)
            _raise_with_name(error, out)
            raise
        sync_folder(staging)
        staging.replace(out)
        (out / INCOMPLETE_MARK).unlink()
        sync_folder(out.parent)


def _raise_with_name(error: BaseException, out: Path) -> None:
    """An error of the disk that names no file gets the folder's name."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        raise OSError(error.errno, error.strerror, str(out)) from error


def identity_of(files: Iterable[Path], settings: Any) -> str:
    """A hash of what a result depends on: files, by place, size and time of change, settings (any
    of JSON's), and dvpa's version.
    """
    from dvpa import __version__

    states = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    text = json.dumps([__version__, settings, states], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _staging_of(out: Path) -> tuple[Path, Path]:
    """`out` and the folder that is filled for it, if neither is in the way."""
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; name a new folder")
    staging = out.with_name(f"{out.name}.incomplete")
    if staging.is_symlink() or (staging.exists() and not _is_ours(staging)):
        raise ValueError(f"{staging}: in the way, and not left by an earlier run of ours")
    return out, staging


def _is_ours(staging: Path) -> bool:
    """Marked, or killed before the mark was there."""
    return staging.is_dir() and (
        (staging / INCOMPLETE_MARK).is_file() or not any(staging.iterdir())
    )


def _clear(folder: Path) -> None:
    """Remove everything but the mark."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != INCOMPLETE_MARK:
            path.unlink()


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write JSON and wait until it is on the disk."""
    file = path.open("wb")
    file.write((json.dumps(content, indent=indent) + "\n").encode())
    sync_and_close(file)


def copy_file(source: Path, folder: Path) -> None:
    """Copy a file into `folder` and wait until it is on the disk."""
    with source.open("rb") as origin:
        file = (folder / source.name).open("wb")
        shutil.copyfileobj(origin, file)
        sync_and_close(file)


def sync_and_close(file: BinaryIO) -> None:
    """Flush, wait until it is on the disk, close."""
    with file:
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
