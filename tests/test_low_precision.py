"""The benchmark of low precision: curves compared as its table says, published ones as near as its page says."""

import json

import pytest

from benchmarks.low_precision import RUNS, SMOOTHED, summarise, table
from benchmarks.low_precision_plot import svg
from tests.processes import ROOT


def test_a_curve_is_compared_with_its_own_default():
    falling = [9 - 0.01 * step for step in range(60)]
    report = summarise({"fp32": falling, "bf16": falling, "float8": [loss + 0.125 for loss in falling]}, 60)
    results = report["results"]
    assert results["fp32"]["compared_with"] is None and results["bf16"]["largest_difference"] == 0
    assert results["float8"]["compared_with"] == "bf16"
    assert results["float8"]["largest_difference"] == pytest.approx(0.125)
    assert results["fp32"]["final_loss"] == pytest.approx(9 - 0.01 * (60 - (SMOOTHED + 1) / 2))
    assert "| … float8 (emulated) | " in table(report) and "| +0.1250 | +0.1250 | 8 |" in table(report)
    assert report["check"]["passed"]
    drawing = svg({"a": falling, "b": falling}, SMOOTHED)
    assert drawing.count("<polyline") >= 2 + 2 and "NaN" not in drawing


def test_the_published_curves_are_as_near_as_the_page_says():
    (file, *_) = sorted((ROOT / "benchmarks" / "results").glob("low_precision_*.json"), reverse=True)
    assert file.with_suffix(".svg").exists()
    results = json.loads(file.read_text())["results"]
    assert set(results) == set(RUNS)
    for name, row in results.items():
        if row["compared_with"]:
            assert abs(row["final_difference"]) < 0.002, f"{name} does not train as {row['compared_with']} does"
            assert abs(row["largest_difference"]) < 1.5 * abs(results["fp32_epsilon"]["largest_difference"]), name
    assert results["fp32"]["final_loss"] < 0.01 * results["fp32"]["first_loss"], "the clips are not learnt by heart"
