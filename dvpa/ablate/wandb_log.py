"""A study's results as one W&B run: a step per configuration, a table, the figures, the report."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvpa.ablate.study import digest
from dvpa.evaluate.replacing import write_atomically

_COLUMNS = ("quality", "relative_cost", "apgr", "mixed_kind_apgr", "pgr", "gap_at_oracle")
_OF_ARCHITECTURES = ("nll", "total_params", "activated_params", "flops_per_token", "training_flops")


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
    columns, rows = _rows(results)
    for step, (_, *numbers) in enumerate(rows):
        run.log({k: v for k, v in zip(columns, numbers, strict=True) if v is not None}, step=step)
    last: dict[str, Any] = {
        "configurations": wandb.Table(columns=["configuration", *columns], data=rows)
    }
    last |= {p.stem: wandb.Image(str(p)) for p in files.values() if p.suffix == ".png"}
    run.log(last, step=len(rows))
    run.finish()
    write_atomically(note, json.dumps({"results": identity, "run": run.id}))
    return True


def _rows(results: Mapping[str, Any]) -> tuple[Sequence[str], list[list[Any]]]:
    """Columns, and a line of name and numbers per configuration or architecture."""
    if "architectures" in results:
        lines = results["architectures"]
        numbers = [[line["label"], line["nll"]["mean"]] for line in lines]
        others = [[line[name] for name in _OF_ARCHITECTURES[1:]] for line in lines]
        return _OF_ARCHITECTURES, [a + b for a, b in zip(numbers, others, strict=True)]
    rows = [row for row in results["configurations"] if "infeasible" not in row]
    return _COLUMNS, [[row["name"], *(row[name]["mean"] for name in _COLUMNS)] for row in rows]
