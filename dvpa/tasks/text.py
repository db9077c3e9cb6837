"""Plain text corpora. Splits are by position, never by shuffled lines: neighbouring lines tell of
each other.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .records import read_text
from .task_set import Task


@dataclass(frozen=True)
class TextCorpus:
    """Documents in reading order, non-empty strings."""

    name: str
    documents: tuple[str, ...]

    @staticmethod
    def from_files(paths: str | Path | Iterable[str | Path]) -> "TextCorpus":
        """One document per UTF-8 file, in the order given; ValueError naming the file if it is
        empty or not UTF-8.
        """
        files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        if not files:
            raise ValueError("paths must name at least one file")
        documents = tuple(read_text(path) for path in files)
        for path, document in zip(files, documents, strict=True):
            if not document.strip():
                raise ValueError(f"{path}:1: no text")
        return TextCorpus("+".join(path.stem for path in files), documents)

    @property
    def num_characters(self) -> int:
        """Characters in all documents."""
        return sum(len(document) for document in self.documents)

    def lines(self) -> Iterator[str]:
        """Non-blank lines in order, without their line ends: what a tokenizer is trained on."""
        for document in self.documents:
            yield from (line for line in document.split("\n") if line.strip())

    def passages(self, kind: str, characters: int = 320) -> list[Task]:
        """The text cut at line ends: a passage's first half is the question, the rest its answer,
        which is scored by its nll.
        """
        passages: list[Task] = []
        lines: list[str] = []
        for line in self.lines():
            lines.append(line)
            if sum(map(len, lines)) >= characters:
                half = (len(lines) + 1) // 2
                question, answer = "\n".join(lines[:half]), "\n".join(lines[half:])
                if question.strip() and answer.strip():
                    task = Task.create(question, answer, level=0, kind=kind)
                    passages.append(replace(task, by_nll=True))
                lines = []
        return passages

    def split(self, validation_fraction: float) -> "tuple[TextCorpus, TextCorpus]":
        """(train, validation): the last `validation_fraction` of the characters, cut after a line
        end, is validation.

        ValueError if the fraction is not inside (0, 1), or if the text has no line end to cut at
        near it.
        """
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(
                f"validation_fraction must be between 0 and 1, got {validation_fraction}"
            )
        remaining = round(self.num_characters * (1.0 - validation_fraction))
        train: list[str] = []
        validation: list[str] = []
        for document in self.documents:
            cut = 0 if remaining <= 0 else len(document)
            if 0 < remaining < len(document):
                cut = document.find("\n", remaining) + 1 or len(document)
            train.append(document[:cut])
            validation.append(document[cut:])
            remaining -= len(document)
        parts = [tuple(part for part in side if part.strip()) for side in (train, validation)]
        if not all(parts):
            raise ValueError(
                f"validation_fraction {validation_fraction} leaves one side of {self.name!r} empty"
            )
        return TextCorpus(f"{self.name}/train", parts[0]), TextCorpus(
            f"{self.name}/validation", parts[1]
        )
