"""The passes and their options, as text."""

from __future__ import annotations

import json

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.passes import STEPS


def passes_table() -> RenderableType:
    """One table per pass: option, type, default, meaning."""
    parts: list[RenderableType] = []
    for name, cls in STEPS.items():
        table = Table("option", "default", "meaning", box=None, padding=(0, 2, 0, 2))
        properties = cls.model_json_schema()["properties"]
        for option, entry in properties.items():
            default = json.dumps(entry["default"]) if "default" in entry else "required"
            table.add_row(option, default, " ".join(entry.get("description", "").split()))
        title = Text.assemble((name, "bold"), f": {cls.summary}", (f"  ({cls.paper})" if cls.paper else "", "dim"))
        parts += [title, table, Text()]
    return Group(*parts)
