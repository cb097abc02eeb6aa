"""What was measured, as JSON: the machine, without which a figure is worth nothing, beside the rows."""

from __future__ import annotations

import datetime
import json
import pathlib
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent / "results"
HELP = "write benchmarks/results/NAME.json, or to this path if it has a slash"


def machine(**facts: Any) -> dict[str, Any]:
    """Date, jax, and what else tells one machine from another."""
    return {"date": datetime.date.today().isoformat(), **facts, "jax": jax.__version__}


def save(where: str | pathlib.Path, machine: dict[str, Any], **measured: Any) -> None:
    """where: a path, or a name as in HELP."""
    if isinstance(where, str):
        where = pathlib.Path(where) if "/" in where else RESULTS / f"{where}.json"
    where.write_text(json.dumps({"machine": machine, **measured}, indent=1) + "\n")
