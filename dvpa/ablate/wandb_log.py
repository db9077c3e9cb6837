"""A study's results as one W&B run: a step per configuration, a table, the figures, the report."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvpa.ablate.models import write_atomically
from dvpa.ablate.study import digest

_COLUMNS = ("quality", "relative_cost", "apgr", "mixed_kind_apgr", "pgr", "gap_at_oracle")


def log_study(results: Mapping[str, Any], files: Mapping[str, Path], out: Path, mode: str) -> bool:
    """Log results that were not logged yet; False where there is nothing to do.

    mode: offline, online or disabled; WANDB_MODE wins. Raises ValueError where W&B refuses.
    """
    mode = os.environ.get("WANDB_MODE", mode)
    note, identity = out / "wandb.json", digest(results)
    known = json.loads(note.read_text()) if note.is_file() else {}
    if mode == "disabled" or known.get("results") == identity:
        return False
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dvpa"),
            name=str(results["title"]),
            job_type="ablation",
            dir=str(out),
            mode=mode,  # type: ignore[arg-type]
            config={"study": results["study"], "seeds": results["seeds"]},
        )
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        raise ValueError(f"wandb_mode: {mode}: {error}") from None
    rows = []
    for step, row in enumerate(results["configurations"]):
        if "infeasible" in row:
            continue
        numbers = [row[name]["mean"] for name in _COLUMNS]
        rows.append([row["name"], row["budget"], *numbers])
        run.log({k: v for k, v in zip(_COLUMNS, numbers, strict=True) if v is not None}, step=step)
    table = wandb.Table(columns=["configuration", "budget", *_COLUMNS], data=rows)
    last: dict[str, Any] = {"configurations": table}
    last |= {p.stem: wandb.Image(str(p)) for p in files.values() if p.suffix == ".png"}
    run.log(last, step=len(results["configurations"]))
    run.finish()
    write_atomically(note, json.dumps({"results": identity, "run": run.id}))
    return True
