"""The report of a run: its numbers are the metrics', its sound decodes, hostile text stays text, gaps are told."""

import base64
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from engine.report.rounds import rounds_of, score_table
from engine.report.series import thinned
from engine.report.writer import ReportWriter
from tests.commands import command, done
from tests.data.test_report import Balance

HOSTILE = "</q><script>alert(1)</script>\"'&"


@pytest.fixture
def run(tmp_path):
    lines = [
        {"step": n, "loss": 7 - n / 100, "codebook_losses": [6.0, 5.0], "seconds_per_step": 2} for n in range(1, 91)
    ]
    lines[44]["memory_peak_gib"], lines[89]["memory_peak_gib"] = 3, 1
    lines += [{"step": 90, "eval_loss": 6.125, "eval_codebook_losses": [6.5, 5.5], "alarm": [HOSTILE]}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 91, "lo')
    (tmp_path / "config.yaml").write_text("learning_rate: 0.25\n")
    (tmp_path / "samples").mkdir()
    soundfile.write(tmp_path / "samples" / "a.wav", np.linspace(-0.5, 0.5, 2400), 24000)
    told = [
        {
            "file": "samples/a.wav",
            "stopped": True,
            "seconds": 2,
            "target_seconds": 4,
            "scores": {"word_errors": 1, "words": 4},
        },
        {"file": "../secret.wav", "scores": {}},
        {"file": None, "error": HOSTILE},
    ]
    rows = [{"step": 90, "prompt": n, "name": HOSTILE, "text": HOSTILE} | row for n, row in enumerate(told)]
    (tmp_path / "samples" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_page(run):
    done("report", run)
    html = (run / "report.html").read_text()
    parsed = Balance(html)
    assert parsed.seen["script"] == 1 and "".join(parsed.text).count(HOSTILE) >= 5
    assert "6.1 nats" in html and '90:6.1"' in html, "in words, and in the curve"
    assert "6.1 nats<small>at step 90<" in html and "<dd>3 GiB<" in html, "the peak of the run, not of its last line"
    assert "25.0 %" in html, "one word of four is wrong"
    assert "0.50 ×" in html, "two seconds where the target has four"
    assert "6.125 nats" in html and "3 min 00 s" in html
    assert "metrics.jsonl: 1 line(s) cannot be read" in html and "starts.jsonl is missing" in html
    sound = base64.b64decode(re.search(r"data:audio/flac;base64,([^\"]+)", html).group(1))
    decoded, rate = soundfile.read(io.BytesIO(sound), dtype="int16")
    assert rate == 24000 and (decoded == soundfile.read(run / "samples" / "a.wav", dtype="int16")[0]).all()
    assert "is not a path within its folder" in html


def test_scores_of_a_round_by_hand():
    """Rates are sums by sums, as in engine/evaluate/scores.py; the others means of the samples that have them."""
    scores = {
        "word_errors": 1, "words": 2, "character_errors": 1, "characters": 10, "speaker_similarity": 0.8,
        "spectral_distance_db": 3, "pitch_low_hz": 80, "pitch_median_hz": 100, "pitch_high_hz": 120,
        "silence_share": 0.1, "clipped_share": 0,
    }  # fmt: skip
    one = {"file": "a", "stopped": True, "seconds": 1, "target_seconds": 2, "generation_seconds": 2, "scores": scores}
    other = {"file": "b", "stopped": False, "seconds": 2, "generation_seconds": 7}
    other["scores"] = {"word_errors": 3, "words": 8, "speaker_similarity": 0.4, "silence_share": 0.3}
    lines = [{"step": 5, "prompt": n} | line for n, line in enumerate((one, other, {"file": None}))]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", score_table(rounds_of(lines)))
    assert [re.sub(r"<[^>]+>", "", cell) for cell in cells] == [
        "5", "40.0 %", "10.0 %", "0.60", "50.0 %", "0.50 ×", "3.00 ×", "3.0 dB", "100 Hz 80–120", "20.0 %",
        "0.0 %", "1",
    ]  # fmt: skip


def test_thinning_keeps_the_extremes():
    points = [(n, float(n % 7)) for n in range(10_000)]
    points[4321], points[777] = (4321, 99.0), (777, -99.0)
    kept = thinned(points)
    assert len(kept) <= 400 and {points[0], points[-1], points[4321], points[777]} <= set(kept)


def test_a_folder_of_no_run_is_an_error(tmp_path):
    said = command("report", tmp_path)
    assert said.code == 2 and "→ give the output_dir of a run" in said.errors
    (tmp_path / "config.yaml").write_text("")
    said = command("report", tmp_path, "--out", tmp_path / "gone" / "page.html")
    assert said.code == 2 and "page.html.draft: No such file or directory → look whether" in said.errors


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path):
    said = []
    world = SimpleNamespace(is_main=True)
    ReportWriter().on_save(SimpleNamespace(world=world, output_dir=tmp_path / "gone", say=said.append), 1, tmp_path)
    assert "note: report.html could not be written" in said[0]


def test_a_run_that_fails_has_a_report_too(run):
    going = SimpleNamespace(world=SimpleNamespace(is_main=True), output_dir=run)
    for ends in (True, False):
        writer = ReportWriter()
        writer.on_start(going, 0)
        if ends:
            writer.on_end(going, 90, 0)
            (run / "report.html").unlink()
        writer.close()
        assert (run / "report.html").exists() != ends, "once"
