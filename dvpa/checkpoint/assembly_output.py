"""Everything of an assembled folder but the tensors: side files, report, manifest, index."""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvpa.checkpoint.assembly_figure import histogram_svg
from dvpa.checkpoint.assembly_page import FIGURE, render_card, render_page
from dvpa.checkpoint.assembly_plan import Plan
from dvpa.checkpoint.assembly_report import AssemblyReport, tensor_rows
from dvpa.checkpoint.folders import copy_file, sync_and_close, write_json
from dvpa.checkpoint.index_stream import INDEX_FILE
from dvpa.checkpoint.shard_files import FinishedShard, ShardFiles, remove_journals
from dvpa.checkpoint.step_table import Outcomes
from dvpa.checkpoint.stored_headers import StoredHeaders

MANIFEST = "manifest.json"
REPORT, PAGE, TENSORS, CARD = "assembly.json", "assembly.html", "assembly_tensors.csv", "README.md"
_OURS = {MANIFEST, REPORT, PAGE, TENSORS, CARD, FIGURE, INDEX_FILE, "config.json"}
# What belongs to a checkpoint besides its tensors: tokenizer, templates, remote code, licence.
_SIDE_SUFFIXES = {".json", ".model", ".txt", ".jinja", ".tiktoken", ".py", ".vocab", ".bpe"}
_SIDE_NAMES = ("LICENSE", "LICENCE", "NOTICE")
_ROOM_BESIDE = 16_000_000  # reports and side files


def check_room(folder: Path, base: StoredHeaders, files: ShardFiles) -> None:
    """Check that what is still to be written fits.

    Raises:
        ValueError: it does not.
    """
    needed = _ROOM_BESIDE + sum(
        path.stat().st_size for path in base.files if path.name not in files.finished
    )
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}: {needed / 1e9:.3f} GB are still to be written, {free / 1e9:.3f} GB are free"
        )


def finish_folder(
    folder: Path,
    plan: Plan,
    report: AssemblyReport,
    outcomes: Outcomes,
    shards: Mapping[str, FinishedShard],
) -> None:
    """Write what turns finished shards into a checkpoint; the config and the index come last."""
    base = plan.base.folder
    plain = report.to_dict()
    copied, left_out = _side_files(base, {path.name for path in plan.base.files})
    plain["left_out"] = left_out
    for path in copied:
        copy_file(path, folder)
    with (folder / TENSORS).open("w", encoding="utf-8", newline="") as table:
        csv.writer(table, lineterminator="\n").writerows(tensor_rows(plan, outcomes))
        table.flush()
        os.fsync(table.fileno())
    texts = {
        REPORT: json.dumps(plain, indent=2) + "\n",
        PAGE: render_page(plain),
        CARD: render_card(plain, base),
        FIGURE: histogram_svg(plain),
    }
    for name, text in texts.items():
        if text:
            _write(folder / name, text.encode())
    written = [*(path.name for path in copied), TENSORS, *(n for n, text in texts.items() if text)]
    last = ["config.json", *([INDEX_FILE] if plan.base.has_index else [])]
    hashed = {name: _hash(folder / name) for name in written}
    hashed |= {name: _hash(base / name) for name in last}
    hashed |= {name: _sealed(shard) for name, shard in shards.items()}
    write_json(folder / MANIFEST, {"format": 1, "recipe": plain["recipe"], "files": hashed})
    for name in last:
        copy_file(base / name, folder)
    remove_journals(folder)


def _sealed(shard: FinishedShard) -> dict[str, Any]:
    """A shard's line in the manifest."""
    return {"sha256": shard.sha256, "bytes": shard.num_bytes}


def _hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _write(path: Path, content: bytes) -> None:
    file = path.open("wb")
    file.write(content)
    sync_and_close(file)


def _side_files(base: Path, shards: set[str]) -> tuple[list[Path], list[str]]:
    """Files of the base to copy, and names of what stays behind."""
    copied, left_out = [], []
    for path in sorted(base.iterdir()):
        if path.name in _OURS or path.name in shards:
            continue
        is_side = path.suffix in _SIDE_SUFFIXES or path.name.startswith(_SIDE_NAMES)
        if path.is_file() and is_side:
            copied.append(path)
        else:
            left_out.append(path.name)
    return copied, left_out
