"""What a report says in tables and words of gaps that are negative and of seeds that change nothing."""

from __future__ import annotations

import re

import pandas as pd
from table_of_runs import cells, run
from written_runs import write_run

from cdpo.report import tables
from cdpo.report.findings import findings
from cdpo.report.write import report


def test_seeds_that_change_nothing_are_no_repetitions():
    rows = [run(loss, a, seed=s, m_eval__loss=e) for loss, a, e in
            (("rlhf", 1.0, 0.0), ("dpo", 0.7, 0.5)) for s in (0, 1)]  # fmt: skip
    other = [run("ipo", 0.7, seed=s, m_eval__loss=s / 8) for s in (0, 1)]  # the same share of other worlds
    found = cells(*rows, *other, run("sft", 0.3))
    assert {loss: cell["identical"] for (loss, _), cell in found.items()} == {
        "rlhf": True, "dpo": True, "ipo": False, "sft": False}  # fmt: skip
    table = pd.DataFrame(found.values())
    assert [tables.gaps(table).rows, tables.gaps(table).notes] == [
        [["none", "0.300 (1)‡", "0.300 ± 0.000 (2)", "0.700 (1)"]], [tables.SAME]]  # fmt: skip
    assert tables.attained(table).rows[0][1:3] == ["1.000 (1)‡", "0.700 (1)‡"]
    assert tables.attained(table).notes == [tables.SAME]
    assert [row[2] for row in tables.quality(table)[0].rows] == ["1 (1)‡", "0.7 (1)‡", "0.7 ± 0 (2)", "0.3 (1)"]
    assert tables.attained(table[~table["identical"]]).notes == []


def test_negative_gaps_are_told_beyond_what_searches_differ_by():
    found = cells(run("rlhf", 0.5), run("dpo", 0.5009), run("ipo", 0.5011))
    said = findings(pd.DataFrame(found.values()))
    assert [line for line in said if "negative, by over 0.001" in line and "(ipo under none)" in line] == said[1:]


def test_one_loss_is_no_losses(tmp_path):
    for loss in ("rlhf", "dpo"):
        write_run(tmp_path, loss)
    report(tmp_path)
    assert "Heat map of 1 constraint by 1 loss, from" in (tmp_path / "report.md").read_text()
    assert not re.search(r"\b1 (losses|constraints|runs|panels|seeds)", (tmp_path / "report.md").read_text())
