"""Tables as one JSON file and back, without loss.

    {"leaderboard": {"types": {"rank": "Int64", ...}, "rows": [{"rank": 1, ...}, ...]}, ...}

A missing value is null, an infinite number the string "Infinity" or "-Infinity". Numbers are not
rounded; `types` are those of pandas, in the order of the columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from robench.errors import UsageError, one_line


def to_json(tables: Mapping[str, pd.DataFrame]) -> str:
    """The text of the file, one line for each row of a table."""
    parts = []
    for name, frame in tables.items():
        types = {column: str(kind) for column, kind in frame.dtypes.items()}
        lines = zip(*(frame[column] for column in types), strict=True)
        rows = [json.dumps(dict(zip(types, map(_plain, line), strict=True)), allow_nan=False)
                for line in lines]
        parts.append(f'{json.dumps(name)}: {{"types": {json.dumps(types)},\n"rows": ['
                     + ",\n".join(rows) + "]}")
    return "{" + ",\n".join(parts) + "}\n"


def from_json(text: str) -> dict[str, pd.DataFrame]:
    """The tables of such a file, with their columns, types and values. Raises UsageError."""
    try:
        return {
            name: pd.DataFrame({
                column: pd.Series([_value(row[column], kind) for row in table["rows"]], dtype=kind)
                for column, kind in table["types"].items()
            })
            for name, table in json.loads(text).items()
        }
    except Exception as error:  # damaged text may raise anything in pandas
        raise UsageError(f"these are no tables of robench: {one_line(error)}") from None


def _plain(value: Any) -> Any:
    if pd.isna(value):
        return None
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _value(value: Any, kind: str) -> Any:
    return float(value) if kind == "float64" and value is not None else value
