"""Endurance: a short run of the soak test, what it makes of its measurements, and the report of the long one."""

import json

import pytest

from benchmarks.soak import PHASES, growth
from tests.processes import ROOT
from tests.test_benchmarks import benchmark


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_the_undisturbed_one(tmp_path):
    out = tmp_path / "soak.json"
    short = ("--minutes", "0.01", "--steps", "18", "--pause", "2", "--most_kills", "1")
    benchmark("benchmarks.soak", *short, "--out", str(out))
    (found,) = json.loads(out.read_text())["results"]["rounds"]
    assert found["passed"] and sum(found["kills"].values()) >= 1, found
    assert found["lines_compared"] >= 18 / 5


def test_growth_is_between_the_second_and_the_last_quarter_of_a_life():
    steady, files = [(100, 7)] * 60, [(100, 7)] * 59 + [(100, 12)]
    leaking = [(100 + i, 7) for i in range(60)]
    at_first = [(i, i) for i in range(15)] + [(100, 20)] * 45
    assert growth({1: steady, 2: at_first}) == (0.0, 0)
    assert growth({1: steady, 2: files}) == (0.0, 5)
    assert growth({1: leaking})[0] == pytest.approx(159 / 129 - 1)
    assert growth({1: leaking[:30]}) == (0.0, 0)  # too short a life


def test_the_published_soak_was_long_and_passed():
    (file, *_) = sorted((ROOT / "benchmarks" / "results").glob("soak_*.json"), reverse=True)
    report = json.loads(file.read_text())
    results = report["results"]
    assert report["check"]["passed"] and results["minutes"] >= 20
    assert set(results["kills"]) == set(PHASES) and results["all_kills"] >= 20
    assert all(found["curve_equals_undisturbed"] and not found["left_half_made"] for found in results["rounds"])
