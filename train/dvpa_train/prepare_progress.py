"""How far a broken-off `prepare` had come: its whole shards, and the documents they hold.

`progress.json` lies in the folder being prepared and is replaced whenever a shard is complete; the
finished folder has none.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dvpa.checkpoint.shards import write_json
from dvpa_train.token_shards import Shard, check_hashes

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Finished:
    """Whole shards; usable documents up to their end, and how many of those were left empty."""

    shards: tuple[Shard, ...] = ()
    documents: int = 0
    emptied: int = 0

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Replace what was known before. `facts`: all that the tokens depend on."""
        scratch = folder / f"{PROGRESS}.tmp"
        write_json(scratch, {"facts": dict(facts), **asdict(self)})
        os.replace(scratch, folder / PROGRESS)


def find_finished(folder: Path, facts: Mapping[str, Any]) -> tuple[Finished, str | None]:
    """What can be kept of an earlier run, and why it is nothing; all else is removed from `folder`.

    Every kept shard is read whole.
    """
    found, problem = Finished(), None
    path = folder / PROGRESS
    if path.is_file():
        try:
            data = json.loads(path.read_bytes())
            known = json.loads(json.dumps(facts))
            changed = [name for name in known if data["facts"].get(name) != known[name]]
            if changed:
                raise ValueError(f"another {', '.join(changed)} than before")
            shards = tuple(Shard(**shard) for shard in data["shards"])
            for shard in shards:
                check_hashes(folder, shard)
            found = Finished(shards, int(data["documents"]), int(data["emptied"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            problem = str(error)
    kept = {shard.name for shard in found.shards}
    for other in folder.glob("shard-*"):
        if other.stem not in kept:
            other.unlink()
    return found, problem
