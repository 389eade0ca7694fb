"""Lineage and impact as the command line shows them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from infra.errors import ConfigError
from infra.lineage import Graph
from infra.storage import open_store

SHOWN = 12  # rows of a manifest printed; --json has all
NAMED = 4  # inputs of a stage named


def back(what: str, run: str, out: Path | None, root: str) -> tuple[dict[str, Any], list[str]]:
    """What `what` was made from: as data, and as lines; `out` receives every picture behind it."""
    from tasks.lineage import lineage, target, urls

    store = open_store(root, create=False)
    graph = Graph(store.list())
    artifact = target(store, graph, what, run)
    found = lineage(store, graph, artifact)
    lines = lineage_lines(found)
    if out is not None:
        _write(urls(store, graph, artifact), out)
        lines.append(f"wrote {found['pictures']} rows to {out}")
    return found, lines


def forward(what: str, root: str) -> tuple[dict[str, Any], list[str]]:
    """What learnt from `what`: as data, and as lines."""
    from tasks.impact import impact

    store = open_store(root, create=False)
    found = impact(store, Graph(store.list()), what)
    return found, impact_lines(found)


def lineage_lines(found: Mapping[str, Any]) -> list[str]:
    """One line per stage, inputs before what they made, then the pictures in numbers."""
    width = max(len(step["stage"]) for step in found["steps"])
    lines = [
        f"{step['stage']:<{width}}  {step['kind']:<12}  {step['digest'][:12]}  {_inputs(step['made_from'].values())}".rstrip()
        for step in found["steps"]
    ]
    lines += [f"input {digest[:12]} is no longer in the store" for digest in found["missing"]]
    lines.append(f"trained on {found['pictures']} pictures; --urls FILE lists them")
    for name in ("licences", "domains"):
        if found[name]:
            lines.append(f"{name}: " + ", ".join(f"{value} ({count})" for value, count in found[name].items()))
    return lines


def impact_lines(found: Mapping[str, Any]) -> list[str]:
    """The rows that are meant, then what learnt from them, directly and through others."""
    rows, affected = found["rows"], found["affected"]
    if not rows:
        return [
            f"no manifest has {found['asked']!r}; give a URL as it was listed, a row id, a sha256 or a picture file"
        ]
    lines = [_row_line(row) for row in rows[:SHOWN]]
    lines += [f"and {len(rows) - SHOWN} more rows; --json lists them"] if len(rows) > SHOWN else []
    if not affected:
        return [*lines, "no stage trained on it"]
    width = max(len(entry["stage"]) for entry in affected)
    lines += [
        f"{entry['stage']:<{width}}  {entry['kind']:<12}  {entry['digest'][:12]}  {_how(entry)}" for entry in affected
    ]
    runs = sorted({run for entry in affected for run in entry["runs"]})
    return [*lines, f"runs: {', '.join(runs) or 'none recorded'}"]


def _row_line(row: Mapping[str, Any]) -> str:
    bits = f", {row['bits']} bits of its hash differ" if row["relation"] == "looks like it" else ""
    because = f" ({', '.join(row['reasons'])})" if row["reasons"] else ""
    return f"row {row['row_id']}: {row['relation']}{bits}; {row['decision']}{because}; {row['url']}"


def _how(entry: Mapping[str, Any]) -> str:
    return "trained on it" if entry["trained"] else "made " + _inputs(entry["made_from"])


def _inputs(stages: Collection[str]) -> str:
    named = sorted(set(stages))
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return f"from {', '.join(named[:NAMED])}{more}" if named else ""


def _write(table: Any, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    match out.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(table, out, write_page_checksum=True)
        case ".csv":
            joined = pa.array([" ".join(stages) for stages in table["stages"].to_pylist()], pa.string())
            pyarrow.csv.write_csv(table.set_column(table.schema.get_field_index("stages"), "stages", joined), out)
        case _:
            raise ConfigError(f"--urls {out} ends with {out.suffix!r}; give a file that ends with .csv or .parquet")
