"""From files to a prepared folder (`dvpa_train.token_shards`): one pass, bounded memory.

Reading, writing and hashing run in this process; tokenising runs in the threads of the Rust
backend, which returns documents in order, so the output does not depend on their number.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dvpa.checkpoint.shards import staged_folder, write_json
from dvpa_train.documents import Document, Unit, expand, read_documents
from dvpa_train.prepare_progress import PROGRESS, Finished, find_finished
from dvpa_train.token_shards import (
    MANIFEST,
    Manifest,
    SourceFile,
    TokenShardWriter,
    dtype_for,
    read_manifest,
    verify_shard,
)
from dvpa_train.tokenizer_files import load_tokenizer, tokenizer_hash

DEFAULT_SHARD_TOKENS = 1 << 27
BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 1 << 20  # tokenised at once


@dataclass(frozen=True)
class PrepareOptions:
    """How documents become tokens.

    `bos`, `eos`: put the token around every document; None: if the tokenizer has one. `unit`: what
    a document is in a text file. `strict`: an unusable document is an error.
    """

    field: str = "text"
    unit: Unit = "file"
    bos: bool | None = None
    eos: bool | None = None
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    strict: bool = False


def prepare(
    files: Sequence[str],
    tokenizer_folder: Path,
    out: Path,
    options: PrepareOptions | None = None,
    *,
    workers: int = 1,
    console: Console | None = None,
) -> Manifest:
    """Tokenise `files` (names or globs) into the new folder `out`: complete or absent.

    A run that breaks off leaves `<out>.incomplete`. The next one keeps its whole shards if files,
    tokenizer and options are the same; it reads the documents in them again, but tokenises none.

    Args:
        workers: threads of the tokenizer. They start with its first use in a process, so a later
            call in the same process keeps the first number.

    Raises:
        FileNotFoundError: a file, or the tokenizer, is missing.
        ValueError: `out` is in use, nothing is left to train on, a bad option, an unreadable file,
            or, with `strict`, an unusable document.
        ImportError: Parquet without pyarrow.
    """
    options = options or PrepareOptions()
    if options.shard_tokens < 1 or workers < 1:
        raise ValueError(
            f"shard_tokens, workers: {options.shard_tokens}, {workers} must be 1 or more"
        )
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    paths = expand(files)
    tokenizer = load_tokenizer(tokenizer_folder)
    bos_id, eos_id = (_special(tokenizer, name, getattr(options, name)) for name in ("bos", "eos"))
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = dtype_for(vocab_size)
    skipped: Counter[str] = Counter()
    facts = {
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        "tokenizer": [tokenizer_hash(tokenizer_folder), tokenizers.__version__],
        "options": [asdict(options), bos_id, eos_id],
    }
    with staged_folder(out, keep=True) as folder:
        done = _resume(folder, facts, console)
        skipped.update({"empty": done.emptied} if done.emptied else {})
        writer = TokenShardWriter(folder, dtype, options.shard_tokens, done.shards)
        documents, emptied = done.documents, done.emptied
        with _Bar(paths, console) as bar:
            for batch in _batches(paths, options, bar, skipped, done.documents):
                for document, ids in zip(batch, _encode(tokenizer, batch), strict=True):
                    documents += 1
                    if not ids:  # a normaliser may leave nothing
                        _skip(document, "empty", options.strict, skipped)
                        emptied += 1
                        continue
                    if writer.add([*_given(bos_id), *ids, *_given(eos_id)]):
                        Finished(tuple(writer.shards), documents, emptied).save(folder, facts)
        writer.close()
        if not writer.shards:
            raise ValueError(f"no usable document in {len(paths)} files ({describe(skipped)})")
        manifest = Manifest(
            dtype=dtype,
            vocab_size=vocab_size,
            bos_id=bos_id,
            eos_id=eos_id,
            tokenizer_sha256=tokenizer_hash(tokenizer_folder),
            num_tokens=sum(shard.num_tokens for shard in writer.shards),
            num_documents=sum(shard.num_documents for shard in writer.shards),
            skipped=dict(sorted(skipped.items())),
            shards=tuple(writer.shards),
            sources=tuple(_source(path) for path in paths),
            options={"field": options.field, "unit": options.unit},
        )
        write_json(folder / MANIFEST, manifest.to_dict())
        (folder / PROGRESS).unlink(missing_ok=True)
    return manifest


def _resume(folder: Path, facts: dict[str, Any], console: Console | None) -> Finished:
    done, problem = find_finished(folder, facts)
    if console is not None and problem is not None:
        console.print(f"not resumed: {problem}")
    elif console is not None and done.shards:
        console.print(f"resumed: {len(done.shards)} shards, {done.documents:,} documents")
    return done


def verify(folder: Path, console: Console | None = None) -> Manifest:
    """Read a prepared folder whole and compare it with its manifest.

    Raises:
        FileNotFoundError, ValueError: it differs; the message names the file.
    """
    manifest = read_manifest(folder)
    with _Bar([folder / f"{shard.name}.bin" for shard in manifest.shards], console) as bar:
        for shard in manifest.shards:
            bar.start(folder / f"{shard.name}.bin")
            verify_shard(folder, manifest, shard)
    return manifest


def describe(skipped: dict[str, int]) -> str:
    """Skipped documents and why, in words."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
    return f"{sum(skipped.values())} skipped: {reasons}" if skipped else "none skipped"


def _batches(
    paths: Sequence[Path],
    options: PrepareOptions,
    bar: "_Bar",
    skipped: Counter[str],
    done: int,
) -> Iterator[list[Document]]:
    """Usable documents, as many as are tokenised at once; across files, so small ones share.

    Those that are `done` already, the first ones, are only read.
    """
    batch: list[Document] = []
    characters = 0
    for path in paths:
        bar.start(path)
        for document in read_documents(path, options.field, options.unit):
            if document.problem is not None:
                _skip(document, document.problem, options.strict, skipped)
                continue
            if done:
                done -= 1
                continue
            batch.append(document)
            characters += len(document.text)
            if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield batch
                bar.update(document.position)
                batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Any, batch: list[Document]) -> list[list[int]]:
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(
        [document.text for document in batch], add_special_tokens=False
    )
    return [encoding.ids for encoding in encoded]


def _skip(document: Document, reason: str, strict: bool, skipped: Counter[str]) -> None:
    if strict:
        raise ValueError(f"{document.where}: {reason} (--strict)")
    skipped[reason] += 1


def _special(tokenizer: Any, name: str, wanted: bool | None) -> int | None:
    value = getattr(tokenizer, f"{name}_token_id")
    if wanted and value is None:
        raise ValueError(f"--{name}: the tokenizer has no {name} token")
    return None if wanted is False or value is None else int(value)


def _given(value: int | None) -> tuple[int, ...]:
    return () if value is None else (value,)


def _source(path: Path) -> SourceFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SourceFile(str(path), path.stat().st_size, digest)


class _Bar:
    """Progress in bytes over all files; quiet without a console."""

    def __init__(self, paths: Sequence[Path], console: Console | None) -> None:
        self._sizes = {path: path.stat().st_size for path in paths}
        self._done, self._current = 0, 0
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=console,
            disable=console is None or not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("", total=sum(self._sizes.values()))

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._progress.stop()

    def start(self, path: Path) -> None:
        """A file begins, and the one before is read."""
        self._done += self._current
        self._current = self._sizes[path]
        self._progress.update(self._task, completed=self._done, description=path.name)

    def update(self, position: int) -> None:
        """The current file is read up to `position`."""
        self._progress.update(self._task, completed=self._done + position)
