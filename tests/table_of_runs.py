"""Small tables of runs, made row by row, with their labels and cells."""

from __future__ import annotations

import pandas as pd

from cdpo.report import gap
from cdpo.report.labels import label

RLHF = "cdpo.losses.RLHF"
COUNTER = iter(range(10_000))


def run(loss, attained=None, constraint="none", seed=0, state="finished", **more):
    """A row of the table of runs. Keywords: config keys with __ for the dot, metrics with a leading m_, the words
    of its certificate with c_."""
    row = {"directory": f"run{next(COUNTER):04d}", "state": state, "model": "tabular", "dataset": "bandit"}
    row |= {"loss": loss, "optimizer": "adamw", "constraint": constraint, "seed": seed, "restart": 0}
    row |= {"config.seed": seed, "config.beta": 1.0, "metric/objective/attained": attained, "metric/objective": 0.0}
    row |= {"certificate.status": "certified", "command": f"cdpo-train loss={loss} seed={seed}"}
    if loss == "rlhf":
        row |= {"config.loss._target_": RLHF, "config.loss.rewards": "data", "config.loss.beta": 1.0}
    for key, value in more.items():
        prefix, name = {"m_": ("metric/", key[2:]), "c_": ("certificate.", key[2:])}.get(key[:2], ("config.", key))
        row[prefix + name.replace("__", "." if prefix == "config." else "/")] = value
    return row


def cells(*rows):
    """The cells of a table of these runs, by (loss, constraint)."""
    labelled = label(pd.DataFrame(rows))
    table = gap.cells(gap.with_gaps(gap.best(labelled)), labelled.settings)
    assert len(table.groupby(["loss", "constraint", "setting"])) == len(table)
    return {(row["loss"], row["constraint"]): row for row in table.to_dict("records")}


def labels(*rows):
    return label(pd.DataFrame(rows))
