"""The bars that figures are held against: rows of a benchmark's JSON file, and the table that its run ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def at_least(name: str, value: float, limit: float) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "holds": value >= limit}


def at_most(name: str, value: float, limit: float) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "holds": value <= limit}


def table_of(bars: Sequence[dict[str, Any]]) -> Table:
    table = Table("bar", "value", "limit", "holds")
    for bar in bars:
        table.add_row(bar["name"], f"{bar['value']:.3f}", f"{bar['limit']:.3f}", "yes" if bar["holds"] else "NO")
    return table
