"""Marks: what is no optimum is not called a gap, in every table, in both pages, in words and in signs."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from mixed_sweep import mixed
from report_files import Page
from table_of_runs import cells, labels, run
from written_runs import NOT_REACHED, change, write_run

from cdpo.report import gap, tables
from cdpo.report.findings import findings
from cdpo.report.marks import mended
from cdpo.report.write import report


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = mixed(tmp_path_factory.mktemp("outputs") / "mixed")
    report(folder)
    return folder


def searched(loss, attained=None, *place, starts=64, hits=0.05, **more):
    numbers = {"m_certificate__starts": starts, "m_certificate__hits": hits}
    return run(loss, attained, *place, c_status="searched", **numbers | more)


def gap_cell(*rows):
    """The cell of DPO in the table of gaps of these runs."""
    table = tables.gaps(pd.DataFrame(cells(*rows).values()))
    return table.rows[0][list(table.columns).index("dpo")]


# the pages


def test_both_pages_mark_every_cell(pages):
    rows = [line for line in (pages / "report.md").read_text().splitlines() if line.startswith("| ")]
    found = {row[0]: row[1:] for row in ([c.strip() for c in line.strip("|").split("|")] for line in rows[1:8])}
    same, more = "0.270 ± 0.000 (3)", "0.360 ± 0.000 (3)"
    assert found["none"] == [f"{same}§", more]
    assert found["early_stop"] == [f"path {same}", f"path {more}"]
    assert found["kl_budget"] == [f"as trained {same} \\[1\\]", f"as trained {more} \\[1\\]"]
    assert found["l2_ball"] == [f"as trained {same} \\[2\\]", more]
    assert found["lora_r1"] == [f"≥ {same} (64 starts, 5% hit)", f"~ {more}∞ (64 starts, 5% hit, 0.220 to 0.420)"]
    page = (pages / "report.html").read_text()
    assert f'<td class="not_reached" title="It stopped too early.">as trained {same} [2]</td>' in page
    assert f'<td class="none" title="Early stopping is no set of policies: this is a path.">path {same}</td>' in page
    for text in (Page(page).text, (pages / "report.md").read_text()):
        assert "Mend it: cdpo-train loss=dpo constraint=l2_ball seed=0 optimizer=exact" in text
        assert "residual 0.74, held against 1e-06, outside by 0.05. Its KL is over the budget. Mend it: " in text
        assert "residual 0.74, held against 1e-06. It stopped too early. Mend it: " in text
        assert "hard labels: DPO has no finite optimum" in text


def test_findings_name_no_gap_that_is_none(pages):
    text = Page((pages / "report.html").read_text()).text
    first, second = "3 gaps are certified: the largest is", "4 gaps are searched: the largest is about"
    assert text.index(first) < text.index(second) < text.index("3 cells are no gap, as a solver stopped too early")
    found = cells(run("rlhf", 1.0), run("dpo", 0.9), run("ipo", 0.1, c_status="not_reached"))
    said = " ".join(findings(pd.DataFrame(found.values())))
    assert "1 gap is certified: 0.100 (1), dpo under none." in said
    assert "0.900" not in said


def test_figures_hatch_and_hollow_what_is_no_gap(pages):
    text = Page((pages / "report.html").read_text()).text
    assert "Hatched: a solver stopped before the optimum." in text
    assert text.count("Hollow: not reached, or without a certificate.") == 3  # quality, levels, frontier
    drawn = (pages / "figures" / "gap.svg").read_text()
    assert "as trained" in drawn
    assert "path 0.270" in drawn


def test_the_certificates_have_the_solver_s_error(pages):
    table = pd.read_csv(pages / "gap.csv").set_index(["loss", "constraint"])
    one = table.loc[("gaussian_power", "lora_r1")]
    numbers = [one[name] for name in ("attained_low", "attained_high", "starts", "hits", "supremum")]
    assert numbers == pytest.approx([0.4, 0.6, 64, 0.05, 1e7])
    assert one["gap_low"] == pytest.approx(one["ceiling"] - 0.6)
    row = "| lora_r1 | gaussian_power | searched | 1e-08 | 1e-06 | – | 64 | 5% | 0.460 | 0.400 to 0.600 | 1e+07 |"
    assert row in (pages / "report.md").read_text()


# which mark


@pytest.mark.parametrize(
    ("rlhf", "dpo", "shown"),
    [
        ("certified", "certified", "0.200 (1)"),
        ("searched", "certified", "≥ 0.200 (1)"),
        ("certified", "searched", "~ 0.200 (1)"),
        ("searched", "searched", "~ 0.200 (1)"),
        ("certified", "not_reached", "as trained 0.200 (1) [1]"),
        ("not_reached", "searched", "as trained 0.200 (1) [1]"),
        ("not_reached", "none", "as trained 0.200 (1) [1]"),
        ("none", "searched", "unknown 0.200 (1)"),
        ("certified", None, "unknown 0.200 (1)"),
    ],
)
def test_a_gap_is_as_good_as_the_worse_of_its_runs(rlhf, dpo, shown):
    assert gap_cell(run("rlhf", 0.9, c_status=rlhf), run("dpo", 0.7, c_status=dpo)) == shown


def test_a_cell_is_as_good_as_its_worst_seed():
    rows = [run(loss, a, seed=s) for loss, a in (("rlhf", 0.9), ("dpo", 0.7)) for s in (0, 1)]
    rows[3]["certificate.status"] = "not_reached"
    assert gap_cell(*rows).startswith("as trained 0.200")
    assert cells(*rows)["rlhf", "none"]["own_mark"] == "certified"


def test_noise_and_paths_are_called_so():
    rows = [run(loss, a, "dropout", c_status="none", c_says="Dropout is noise.") for loss, a in
            (("rlhf", 0.9), ("dpo", 0.7))]  # fmt: skip
    assert gap_cell(*rows) == "noise 0.200 (1)"


def test_a_run_written_before_certificates_is_unknown(tmp_path):
    for loss in ("rlhf", "dpo"):
        change(write_run(tmp_path, loss), "summary", certificate=None)
    text = Page(report(tmp_path).read_text()).text
    assert "unknown 0.270 (1)" in text
    assert "largest" not in text


def test_a_searched_rlhf_that_is_beaten_was_not_reached():
    rows = [searched("rlhf", 0.5, "lora_r1", c_mend="optimizer.starts=256"), searched("dpo", 0.6, "lora_r1"),
            searched("ipo", 0.2, "lora_r1")]  # fmt: skip
    table = tables.gaps(pd.DataFrame(cells(*rows).values()))
    assert [str(cell) for cell in table.rows[0]] == ["lora_r1", "as trained -0.100 (1) [1]", "as trained 0.300 (1) [1]"]
    said = "rlhf under lora_r1 (seed 0): dpo attains 0.100 more, so its search has failed."
    assert list(table.remarks) == [f"{said} Mend it: cdpo-train loss=rlhf seed=0 optimizer.starts=256"]
    assert cells(*rows)["rlhf", "lora_r1"]["own_mark"] == "not_reached"
    rows[1]["metric/objective/attained"] = 0.5009  # searches of one optimum end that far apart
    assert gap_cell(*rows) == "~ -0.001 (1)"


def test_of_a_curve_over_norms_every_run_counts():
    more = {"m_change__norm": 5.0, "constraint__l2_to_start__strength": 1.0}
    far = {"m_change__norm": 10.0, "constraint__l2_to_start__strength": 0.1}
    rows = [run("rlhf", 0.5, "l2_to_start", **more), run("rlhf", 0.8, "l2_to_start", **far),
            run("dpo", 0.3, "l2_to_start", **more)]  # fmt: skip
    assert gap_cell(*rows) == "0.200 (1)†"
    rows[1]["certificate.status"] = "not_reached"
    assert gap_cell(*rows) == "as trained 0.200 (1)† [1]"


def test_a_curve_that_is_beaten_at_one_norm_was_not_reached_there():
    rows = [run("rlhf", a, "l2_to_start", c_status="searched", m_change__norm=n, constraint__l2_to_start__strength=s)
            for s, n, a in ((0.1, 10.0, 0.8), (1.0, 5.0, 0.4))]  # fmt: skip
    rows += [run(loss, a, "l2_to_start", m_change__norm=5.0, constraint__l2_to_start__strength=0.5) for loss, a in
             (("dpo", 0.6), ("ipo", 0.1))]  # fmt: skip
    found = cells(*rows)
    assert [found[loss, "l2_to_start (strength 0.5)"]["mark"] for loss in ("dpo", "ipo")] == ["not_reached", "searched"]
    assert "dpo attains 0.200 more" in found["dpo", "l2_to_start (strength 0.5)"]["trouble"]
    assert found["rlhf", "l2_to_start (strength 1)"]["own_mark"] == "searched"


def test_the_command_that_mends_has_no_word_twice():
    command = "cdpo-train loss=dpo optimizer=sgd optimizer.momentum=0.9 'dataset.path=a b' seed=0"
    assert mended(command, "optimizer=exact") == "cdpo-train loss=dpo 'dataset.path=a b' seed=0 optimizer=exact"
    assert mended("cdpo-train optimizer=exact optimizer.starts=8", "optimizer.starts=64") == (
        "cdpo-train optimizer=exact optimizer.starts=64")  # fmt: skip


# which of several searches


def test_a_loss_whose_value_ranks_nothing_is_ranked_by_j():
    rows = [searched("dpo", a, restart=i, m_objective=o, m_objective__J=a, c_ranked_by="J") for i, (o, a) in
            enumerate([(1.0, 0.2), (3.0, 0.6), (2.0, 0.4)])]  # fmt: skip
    found = cells(run("rlhf", 0.9), *rows)["dpo", "none"]
    assert (found["attained"], found["searches"]) == (0.6, 3)
    assert gap_cell(run("rlhf", 0.9), *rows) == "≥ 0.300 (1)"
    for row in rows:
        row["certificate.status"] = "certified"  # stationary for sure, and still the best of several
    assert gap_cell(run("rlhf", 0.9), *rows) == "≥ 0.300 (1)"
    table = tables.attained(pd.DataFrame(cells(run("rlhf", 0.9), *rows).values()))
    assert [str(cell) for cell in table.rows[0][1:]] == ["0.900 (1)", "≤ 0.600 (1)"]


def test_the_range_is_that_of_all_searches_within_epsilon_of_the_best():
    """A share of the objective's fall, which is 0.5 here: solutions down to 1.005 are as good, not to 1.01."""
    numbers = [(1.0, 0.5, 0.45, 0.6), (1.004, 0.7, 0.3, 0.7), (1.008, 0.9, 0.1, 0.95)]
    rows = [searched("dpo", a, restart=i, m_objective=o, m_certificate__epsilon=0.01, m_certificate__attained_low=low,
                     m_certificate__attained_high=high) for i, (o, a, low, high) in enumerate(numbers)]  # fmt: skip
    for row in rows:
        row["metric/certificate/fall"] = 0.5
    found = cells(run("rlhf", 0.9), *rows)["dpo", "none"]
    assert [found[name] for name in ("attained", "attained_low", "attained_high")] == [0.5, 0.3, 0.7]
    assert gap_cell(run("rlhf", 0.9), *rows).below == "64 starts, 5% hit, 0.200 to 0.600"
    for row in rows:
        del row["metric/certificate/fall"]  # written before it was: the best stands for itself
    assert cells(run("rlhf", 0.9), *rows)["dpo", "none"]["attained_high"] == 0.6


def test_starts_and_hits_are_those_of_one_run():
    """The one of which the fewest starts found the best; of a closed form there is one start, which says nothing."""
    rows = [searched("rlhf", 0.9, starts=256, hits=0.01), searched("dpo", 0.7, starts=32, hits=0.5)]
    assert gap_cell(*rows).below == "256 starts, 1% hit"
    rows[0]["metric/certificate/hits"] = 1 / 256
    assert gap_cell(*rows).below == "256 starts, <1% hit"
    rows = [
        searched("rlhf", 0.9, starts=256, hits=1.0),
        run("dpo", 0.7, m_certificate__starts=1, m_certificate__hits=1.0),
    ]
    assert gap_cell(*rows).below == "256 starts, 100% hit"
    rows = [searched(loss, a, seed=s, starts=n, hits=h) for loss, a, n, h in
            (("rlhf", 0.9, 1, 0.5), ("dpo", 0.7, 8, 0.9)) for s in (0, 1)]  # fmt: skip
    assert gap_cell(*rows).below == "1 start, 50% hit"
    dpo = cells(*rows)["dpo", "none"]
    assert (dpo["own_starts"], dpo["own_hits"]) == (8, 0.9)


def test_a_supremum_stands_in_its_own_row():
    rows = [searched("rlhf", 0.9, m_certificate__supremum=1.0, m_certificate__norm=1e7), searched("dpo", 0.7)]
    table = tables.certificates(pd.DataFrame(cells(*rows).values()))[0]
    assert {row[1]: row[-1] for row in table.rows} == {"rlhf": "1e+07", "dpo": "–"}
    assert gap_cell(*rows) == "~ 0.200 (1)∞"


def test_the_sign_of_a_loss_that_is_not_proven_says_that_rlhf_may_not_be_either():
    table = pd.DataFrame(cells(searched("rlhf", 0.9), searched("dpo", 0.7)).values())
    assert any(note.startswith("~:") and "RLHF" in note for note in tables.gaps(table).notes)
    assert not any(note.startswith("~:") and "RLHF" in note for note in tables.attained(table).notes)


def test_a_certified_search_counts_before_a_lower_objective():
    rows = run("dpo", 0.5, m_objective=1.0), run("dpo", 0.4, m_objective=1.0 - 1e-12, restart=1, c_status="not_reached")
    assert gap.best(labels(*rows))["attained"].tolist() == [0.5]


# budgets


@pytest.mark.parametrize(("kl", "over"), [(0.2001, False), (0.2003, True), (None, False)])
def test_a_kl_above_its_budget_is_marked(kl, over):
    more = {"constraint__kl_budget__budget": 0.2, "m_eval__kl__candidates": kl}
    rows = [run("dpo", 0.5, "kl_budget", **more), run("dpo", 0.5, m_eval__kl__candidates=9.0)]
    table = tables.quality(pd.DataFrame(cells(*rows).values()))[0]
    shown = {row[0]: row[list(table.columns).index("kl")] for row in table.rows}
    assert shown["none"] == "9 (1)"
    assert shown["kl_budget"] == {True: "0.2003 (1) ▲", False: f"{kl} (1)" if kl else "–"}[over]
    assert (getattr(shown["kl_budget"], "kind", "") == "over") == over
    assert ("▲: above its budget." in table.notes) == over


@pytest.mark.parametrize(("stderr", "over"), [(0.11, False), (0.09, True)])
def test_a_sampled_kl_is_said_to_be_an_estimate_and_is_over_by_two_errors(stderr, over):
    more = {"constraint__kl_budget__budget": 0.2, "m_kl_budget__kl_sampled": 0.4}
    rows = [run("dpo", 0.5, "kl_budget", **more, m_kl_budget__kl_sampled_stderr=stderr)]
    table = tables.quality(pd.DataFrame(cells(*rows).values()))[0]
    assert table.rows[0][list(table.columns).index("kl sampled")] == ("0.4 (1) ▲" if over else "0.4 (1)")
    assert tables.ESTIMATE in table.notes


def test_every_run_over_its_budget_is_marked(pages):
    page = (pages / "report.html").read_text()
    assert page.count('<td class="over">0.2') == 3 + 1  # RLHF's 3 seeds with a KL of 0.2 of 0.15, and their mean
    assert page.count("▲: above its budget.") == 2


def test_a_certificate_that_is_no_object_is_none(tmp_path):
    for loss in ("rlhf", "dpo"):
        change(write_run(tmp_path, loss), "summary", certificate=[NOT_REACHED])
    assert "unknown 0.270 (1)" in Page(report(tmp_path).read_text()).text
    assert math.isnan(pd.read_csv(tmp_path / "gap.csv")["residual"].max())
