"""URL lists as tables: Parquet, CSV, TSV, JSONL and text, also gzipped."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from infra.errors import ConfigError, DataRefused


def read_list(path: Path, url_column: str) -> pa.Table:
    """A list as a table; what cannot be read is refused with its place."""
    try:
        return _table(path, url_column)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())[:300]
        raise DataRefused(f"source {path} cannot be read: {words}; repair it or give another list") from error


def _table(path: Path, url_column: str) -> pa.Table:
    suffix = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if suffix == ".parquet":
        return pq.read_table(path)
    with pa.input_stream(str(path), compression="detect") as stream:
        match suffix:
            case ".csv" | ".tsv":
                options = pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter="," if suffix == ".csv" else "\t")
                return pyarrow.csv.read_csv(stream, parse_options=options)
            case ".jsonl" | ".json":
                return pyarrow.json.read_json(stream)
            case ".txt":
                lines = [line.strip() for line in stream.read().decode("utf-8-sig").splitlines()]
                return pa.table({url_column: pa.array([line for line in lines if line], pa.string())})
            case other:
                raise ConfigError(f"source {path} ends with {other!r}; give .parquet, .csv, .tsv, .jsonl or .txt")
