"""Folders that are complete or absent, and files that are on the disk once written; no PyTorch."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

INCOMPLETE_MARK = ".dvpa-incomplete"


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`, renamed to `out` at the end: `out` is absent or complete.

    A killed run leaves `<out>.incomplete` behind, which the next one removes.

    Raises:
        ValueError: `out` holds files already, or `<out>.incomplete` is not one of ours.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; name a new folder")
    staging = out.with_name(f"{out.name}.incomplete")
    if staging.exists() or staging.is_symlink():
        if staging.is_symlink() or not (staging / INCOMPLETE_MARK).is_file():
            raise ValueError(f"{staging}: in the way, and not left by an earlier run of ours")
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    (staging / INCOMPLETE_MARK).touch()
    try:
        yield staging
        (staging / INCOMPLETE_MARK).unlink()
        sync_folder(staging)
        staging.replace(out)  # atomic, also over an empty folder
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON and wait until it is on the disk."""
    file = path.open("wb")
    file.write((json.dumps(content, indent=2) + "\n").encode())
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
