"""The intervals of a report cover what they say they cover, and are written in one way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from cdpo.report.intervals import counted, interval, number, short


@pytest.mark.parametrize("n", [3, 5, 10])
def test_95_percent_are_95_percent(n):
    draws = np.random.default_rng(0).normal(0.3, 2.0, size=(4000, n))
    found = [interval(row) for row in draws]
    covered = np.mean([abs(one[""] - 0.3) <= one["_half"] for one in found])
    assert 0.93 <= covered <= 0.97


def test_it_is_that_of_students_test():
    values = [0.1, 0.4, 0.2, 0.9]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert found == {"": pytest.approx(0.4), "_half": pytest.approx((high - low) / 2), "_n": 4}
    assert interval([0.2, 0.3])["_half"] == pytest.approx(12.706 * 0.05, rel=1e-4)  # of any table of t


def test_one_value_has_no_interval():
    one, none = interval([0.5]), interval([])
    assert (one[""], one["_n"], none["_n"]) == (0.5, 1, 0)
    assert all(math.isnan(number) for number in (one["_half"], none["_half"], none[""]))


def test_one_way_of_writing_it():
    assert number(0.1234, 0.0456, 3) == "0.123 ± 0.046 (3)"
    assert [number(-0.0001, math.nan, 1), number(None), number(0.5)] == ["0.000 (1)", "–", "0.500"]
    assert short(1234.56, 0.0456, "2 of 3") == "1235 ± 0.046 (2 of 3)"
    assert [counted([1, 1]), counted([3, 2]), counted([])] == ["1 seed", "2 to 3 seeds", "0 seeds"]
    assert [counted([1], "loss"), counted([0], "loss"), counted([4, 2, 3], "loss")] == [
        "1 loss", "0 losses", "2 to 4 losses"]  # fmt: skip
