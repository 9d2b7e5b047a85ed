"""Rows of preference data as files hold them, the HH file, and how to write every file type."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

HH = Path(__file__).parents[1] / "../shared/data/hh-harmless-base-test.jsonl.gz"
GOOD = {"prompt": "Q?", "chosen": "yes", "rejected": "no"}


def line(**changes):
    return json.dumps({k: v for k, v in {**GOOD, **changes}.items() if v is not ...}).encode()


DROP = dict.fromkeys(("on_malformed", "on_empty", "on_identical", "on_long"), "drop")
ASKED, YES, NO = ({"role": r, "content": c} for r, c in (("user", "Q?"), ("assistant", "yes"), ("assistant", "no")))


def write(path, records):
    """The records as the file type that `path` names."""
    import pyarrow

    inner = path.with_suffix("") if path.suffix == ".gz" else path
    if inner.suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), inner)
    else:
        text = json.dumps(records, indent=1) if inner.suffix == ".json" else "\n".join(map(json.dumps, records))
        inner.write_text(text)
    if inner != path:
        path.write_bytes(gzip.compress(inner.read_bytes()))
