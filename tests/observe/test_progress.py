"""The lines of a run, to the letter, and the bar in a terminal of any width."""

import io
import os
import pty
import re
import threading
from types import SimpleNamespace

import pytest
import torch

from engine.observe.lines import WIDTH, duration, format_evaluation, format_step, thousands
from engine.observe.progress import Progress
from engine.runtime.distributed import World

RUN = SimpleNamespace(total=4000)
VALUES = {
    "step": 120, "loss": 4.8123, "text_loss": 2.306, "text_accuracy": 0.41, "audio_loss": 4.714, "audio_accuracy": 0.12,
    "codebook_losses": [3.94, 4.6, 4.7, 4.8, 4.9, 5.0, 5.1, 5.21], "eos_loss": 0.8, "eos_accuracy": 0.75,
    "learning_rate": 1.9e-5, "grad_norm": 0.82, "skipped_steps": 3, "skipped_since": 0,
    "tokens_per_second": 25310.4, "audio_seconds_per_second": 910.2, "mfu": 0.412,
    "data_share": 0.01, "communication_share": 0.04, "memory_gib": 61.23, "eta_seconds": 7389.0,
}  # fmt: skip


def world(rank: int = 0) -> World:
    return World(rank, rank, 2, torch.device("cpu"))


def without(*names: str) -> dict:
    """The values, some of them null."""
    return VALUES | dict.fromkeys(names)


# --- the lines


def test_a_line_names_what_is_known_and_leaves_out_what_is_null():
    assert format_step(without("mfu", "eos_loss", "learning_rate", "codebook_losses", "audio_loss"), 4000) == (
        "step 120/4000 | loss 4.812 | text 2.31 (41%) | gnorm 0.820 | 25.3k tok/s 910 audio-s/s | 61.2 GiB | eta 2h03m"
    )
    assert format_step(without("mfu", "memory_gib", "eos_accuracy", "audio_seconds_per_second"), 4000) == (
        "step 120/4000 | loss 4.812 | text 2.31 (41%) audio 4.71 (12%) [3.9 4.6 4.7 4.8 4.9 5.0 5.1 5.2] eos 0.80 | "
        "lr 1.9e-05 gnorm 0.820 | 25.3k tok/s | eta 2h03m"
    )
    nothing = {name: None for name in VALUES if name not in ("step", "skipped_steps")} | {"codebook_losses": [None] * 8}
    assert format_step(VALUES | nothing | {"skipped_since": 2}, 4000) == (
        "step 120/4000 | loss - | 2 skipped (3 in all)"
    ), "all steps since the last line were skipped"


def test_a_long_line_is_shortened_in_a_known_order():
    line = format_step(VALUES, 4000)
    assert "[3.9 4.6 … 5.2] eos 0.80 |" in line and "lr" not in line and len(line) <= WIDTH
    longer = VALUES | {"data_share": 0.31, "communication_share": 0.05}
    assert format_step(longer, 4000).endswith("| waits for data 31% communication 5% | eta 2h03m")
    assert "audio-s/s" not in format_step(longer, 4000)
    assert "waits" not in line, "neither is worth a word"
    four = VALUES | {"codebook_losses": [1.0, None, 3.0, 4.0], "mfu": None}
    assert "[1.0 - 3.0 4.0]" in format_step(four, 4000)


def test_a_line_of_an_evaluation():
    assert format_evaluation(without("text_accuracy"), 120, 4000) == (
        "step 120/4000 | eval loss 4.8123 | text 2.31 audio 4.71 (12%) [3.9 4.6 4.7 4.8 4.9 5.0 5.1 5.2] eos 0.80 (75%)"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (86399, "23h59m"),
        (111600, "1d07h"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_large_numbers():
    assert [thousands(n) for n in (0, 999.4, 999.6, 25310, 999949, 1234567)] == (
        ["0", "999", "1.0k", "25.3k", "999.9k", "1.23M"]
    )


# --- where they go


def go_through(progress: Progress) -> None:
    """A run of two logged steps and an evaluation, with a line from another thread."""
    progress.say("before")
    progress.on_start(RUN, 118)
    progress.on_step(RUN, 119, None)
    progress.on_step(RUN, 120, None)
    progress.on_log(RUN, 120, VALUES)
    thread = threading.Thread(target=progress.say, args=("saved [bold]checkpoint-120[/bold]",))
    thread.start()
    thread.join()
    progress.on_step(RUN, 4000, None)
    progress.on_evaluate(RUN, 4000, VALUES)
    progress.on_end(RUN, 4000, 0)
    progress.close()
    progress.say("after")


WANTED = [
    "before", format_step(VALUES, 4000), "saved [bold]checkpoint-120[/bold]", format_evaluation(VALUES, 4000, 4000),
    "after",
]  # fmt: skip


def test_without_a_terminal_plain_lines(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # of which rich would make control characters in a file
    go_through(Progress(world()))
    printed = capsys.readouterr()
    assert printed.out.splitlines() == WANTED and printed.err == ""


def test_lines_are_flushed_one_by_one(monkeypatch):
    """Under a launcher the output is a pipe: unflushed lines come in heaps, or never."""
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(raw), write_through=False))
    Progress(world()).say("one")
    assert raw.getvalue() == b"one\n"


def test_other_processes_are_silent(capsys):
    go_through(Progress(world(rank=1)))
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def in_terminal(monkeypatch, columns: int, stream: str, act) -> str:
    """All that is written to a terminal which stands for `stream`."""
    outer, inner = pty.openpty()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    read: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(outer, read))
    reader.start()
    with open(inner, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(f"sys.{stream}", terminal)
        act()
    reader.join(10)
    os.close(outer)
    return b"".join(read).decode()


def _read_all(end: int, into: list[bytes]) -> None:
    try:
        while chunk := os.read(end, 65536):
            into.append(chunk)
    except OSError:  # the other end is closed
        pass


def frames(written: str) -> list[str]:
    """What is left of each line, or drawing of the bar, without control sequences."""
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part).strip() for part in re.split(r"[\r\n]+", written)]


@pytest.mark.parametrize("columns", [160, 80, 40, 20])
def test_in_a_terminal_lines_stand_above_the_bar(monkeypatch, columns):
    written = in_terminal(monkeypatch, columns, "stdout", lambda: go_through(Progress(world())))
    found = frames(written)
    assert [line for line in found if line in WANTED] == WANTED
    bars = [line for line in found if line and line not in WANTED]
    assert len(bars) > 3 and all(line.startswith("t") for line in bars), bars
    assert max(map(len, bars)) <= columns, "a longer one would be broken, and each drawing leave a line behind"
    if columns >= 80:
        assert "119/4000" in bars[1] and bars[-1].split()[-7:] == [
            "4000/4000", "loss", "4.812", "25.3k", "tok/s", "eta", "2h03m",
        ]  # fmt: skip
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is back"


def test_the_cursor_stays_while_the_bar_is_drawn(monkeypatch):
    """A process that ends by os._exit or a kill cannot bring it back."""

    def killed() -> None:
        progress = Progress(world())
        progress.on_start(RUN, 0)
        progress.on_step(RUN, 1, None)
        progress.on_log(RUN, 1, VALUES)

    written = in_terminal(monkeypatch, 80, "stdout", killed)
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_lines_to_a_file_leave_the_bar_to_the_terminal(monkeypatch, tmp_path):
    file = tmp_path / "log"
    with file.open("w") as log:
        monkeypatch.setattr("sys.stdout", log)
        written = in_terminal(monkeypatch, 80, "stderr", lambda: go_through(Progress(world())))
    assert file.read_text().splitlines() == WANTED
    assert "4000/4000" in written and "eval loss" not in written


def test_no_bar_where_a_terminal_cannot_draw_one(monkeypatch):
    def act() -> None:
        monkeypatch.setenv("TERM", "dumb")
        go_through(Progress(world()))

    assert in_terminal(monkeypatch, 80, "stdout", act).replace("\r", "").splitlines() == WANTED
