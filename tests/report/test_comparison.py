"""Runs side by side: numbers and their best, what differs, speech of the same words; nothing in common is no error."""

import json
import re

import numpy as np
import pytest
import soundfile
import yaml

from engine.report.comparison import distinct_names, provenance_rows, setting_rows
from engine.report.curves import curves
from engine.report.final_numbers import best
from engine.report.run_folder import RunFolder, read_run
from tests.commands import command, done
from tests.data.test_report import Balance

HOSTILE = "</q><script>alert(1)</script>\"'&"


def made(folder, losses=(4, 3), held_out=(5, 4), settings=None, texts=("One.",), pitch=0.5, start=None, speeds=(100,)):
    """A run of ten steps for each loss, an evaluation each ten, and a sample of each text."""
    (folder / "samples").mkdir(parents=True)
    lines = [{"step": 10 * n, "loss": loss, "seconds_per_step": 2} for n, loss in enumerate(losses, 1)]
    lines += [{"step": 10 * n, "eval_loss": loss} for n, loss in enumerate(held_out, 1)]
    lines += [{"step": n, "tokens_per_second_per_gpu": speed} for n, speed in enumerate(speeds, 1)]
    write(folder / "metrics.jsonl", lines)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"learning_rate": 0.25, "validation_split": 0.1} | (settings or {}))
    )
    write(folder / "starts.jsonl", [{"step": 0, "total_steps": 20, "world_size": 1} | (start or {})])
    given = {"reference": "samples/reference.wav", "target": None}
    sound(folder / given["reference"], pitch)
    rows = []
    for n, words in enumerate(texts):
        for step in (10, 20):
            file = f"samples/{step}-{n}.wav"
            sound(folder / file, pitch + n / 10 + step / 1000)
            scores = {"word_errors": len(losses) if step == 20 else 8, "words": 8}
            rows.append({"step": step, "prompt": n, "text": words, "file": file, "scores": scores} | given)
    write(folder / "samples" / "samples.jsonl", rows)
    return folder


def write(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def sound(file, height):
    soundfile.write(file, np.linspace(-height, height, 480), 24000)


def cells(html, heading):
    """The cells of the rows whose first cell is `heading`, without marks, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    found = [[plain(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]
    return [row[1:] for row in found if row and row[0] == heading]


def plain(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html)).strip()


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Two runs, the second longer, by default to comparison.html of the current folder."""
    made(tmp_path / "a", speeds=(100, 300, 110), settings={"lora_rank": 8, "output_dir": "/x", "seed": 1})
    made(
        tmp_path / "b", losses=(4, 3.5, 3.25), held_out=(5, 3.5, 3.75), speeds=(120, 90, 90),
        settings={"lora_rank": 16, "output_dir": "/y", "seed": 1, "validation_split": 0.2},
        texts=("One.", "Only here."), start={"total_steps": 50, "world_size": 2, "versions": {"torch": "2.9"}},
    )  # fmt: skip
    (tmp_path / "a" / "skipped_steps.jsonl").write_text('{"step": 3, "reason": "spike"}\n')
    monkeypatch.chdir(tmp_path)
    assert "comparison written to" in done("report", "a", "b")
    return (tmp_path / "comparison.html").read_text()


def test_the_numbers_and_the_best_of_each_row(page):
    parsed = Balance(page)
    assert parsed.seen["h1"] == 1 and "step 20 of 20, complete" in page and "step 30 of 50<" in page
    assert cells(page, "Loss, the lowest of all evaluations") == [["4 nats at step 20", "3.5 nats ★ at step 20"]]
    assert cells(page, "Loss") == [["4 nats", "3.75 nats ★"], ["3 nats ★", "3.25 nats"]], "held-out, then training"
    assert cells(page, "Tokens per second per GPU, median") == [["110 tokens/s ★", "90 tokens/s"]]
    assert cells(page, "Steps") == [["20", "30"]], "more steps are not better"
    assert cells(page, "Time in steps") == [["40 s", "1 min 00 s"]]
    assert cells(page, "Skipped steps") == [["1", "0 ★"]]
    assert cells(page, "Word errors") == [["25.0 % ★", "37.5 %"]], "2 and 3 of 8 words"


def test_only_what_differs_is_listed_and_places_come_last(page):
    settings = page[page.index('id="settings"') : page.index('id="provenance"')]
    assert re.findall(r"<tr><td[^>]*>(\w+)<", settings) == ["validation_split", "lora_rank", "output_dir"]
    assert cells(settings, "lora_rank") == [["8", "16"]]
    assert "the runs differ in validation_split: their held-out losses do not measure the same" in page
    provenance = page[page.index('id="provenance"') :]
    assert cells(provenance, "world size") == [["1", "2"]] and cells(provenance, "versions: torch") == [["–", "2.9"]]


def test_the_same_words_share_a_row_and_a_reference(page):
    assert page.count('<article class="prompt">') == 1 and "Only here." not in page
    assert "1 more text(s) are not shown" in page
    assert page.count("data:audio/flac") == 3 and page.count("<h5>Reference</h5>") == 1
    assert "<h5>a, step 20</h5>" in page and "<h5>b, step 20</h5>" in page, "the newest of each"


def test_different_references_are_both_there(tmp_path):
    done("report", made(tmp_path / "a"), made(tmp_path / "b", pitch=0.25), "--out", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "<h5>Reference of a</h5>" in html and "<h5>Reference of b</h5>" in html
    assert html.count("data:audio/flac") == 4


def test_curves_of_both_runs_in_their_colours_over_the_longer_runs_steps(tmp_path):
    runs = [read_run(made(tmp_path / "a")), read_run(made(tmp_path / "b", losses=(4, 3, 2)))]
    html = curves(runs)
    assert 'class="line c0" data-label="a" data-unit="nats" data-points="10:4 20:3"' in html
    assert 'class="line c1" data-label="b" data-unit="nats" data-points="10:4 20:3 30:2"' in html
    assert '<span class="now">nats</span>' in html, "of several runs no value is the last one"
    drawn = [re.search(f'class="line {colour}"[^>]* d="([^"]+)"', html).group(1) for colour in ("c0", "c1")]
    ends = [int(path.split("L")[-1].split()[0]) for path in drawn]
    assert ends == [667, 1000], "step 20 of 30 is two thirds of the axis"


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    folders = [tmp_path / parent / "run" for parent in ("x", "y")] + [tmp_path / "other"]
    names = distinct_names([RunFolder(folder, folder.name) for folder in folders])
    assert names == ["x/run", "y/run", "other"]


@pytest.mark.parametrize(
    ("values", "higher", "marked"),
    [((1, 2, None), True, {1}), ((1, 2, 1), False, {0, 2}), ((2, 2), True, set()), ((None, 3), True, set()),
     ((1, 2), None, set())],
)  # fmt: skip
def test_the_best(values, higher, marked):
    assert best(values, higher) == marked


def test_hostile_names_and_words_stay_text(tmp_path):
    a = made(
        tmp_path / "a", settings={"run_name": HOSTILE, HOSTILE: HOSTILE}, texts=(HOSTILE,), start={"device": HOSTILE}
    )
    b = made(tmp_path / "b", texts=(HOSTILE,))
    done("report", a, b, "--out", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    parsed = Balance(html)
    plain_page = Balance(comparison_of(tmp_path / "c", tmp_path / "d"))
    assert parsed.seen["script"] == plain_page.seen["script"] and "<script>alert" not in html
    assert "".join(parsed.text).count(HOSTILE) >= 6
    assert all(link.startswith(("data:audio/flac", "#")) for link in parsed.links), "the page must fetch nothing"


def comparison_of(*folders):
    out = folders[0].parent / "plain.html"
    done("report", *(made(folder) for folder in folders), "--out", out)
    return out.read_text()


def test_runs_with_nothing_in_common(tmp_path):
    a, b = made(tmp_path / "a"), made(tmp_path / "b", texts=("Two.",))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 5, "mfu": 0.5}\n')
    done("report", a, b, bare, "--out", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    Balance(html)
    assert "No two runs have spoken the same text." in html and "bare: config.yaml is missing" in html
    assert cells(html, "MFU, median") == [["–", "–", "50.0 %"]]
    runs = [read_run(folder) for folder in (a, bare)]
    assert setting_rows(runs) == [] == provenance_rows(runs), "what is not known does not differ"


def test_every_wrong_folder_is_named_at_once(tmp_path):
    said = command("report", made(tmp_path / "a"), tmp_path / "a", tmp_path / "gone", tmp_path, "--out", tmp_path / "p")
    assert said.code == 2 and not (tmp_path / "p").exists()
    for words in (
        f"{tmp_path / 'a'} is given 2 times → give it once",
        f"{tmp_path / 'gone'}: holds",
        f"{tmp_path}: holds",
    ):
        assert words in said.errors
