"""`higgs-engine doctor` in real processes: a sound pair passes, and what is broken ends it soon, in words."""

import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.doctor import disk, ports, report, software
from engine.doctor.filesystem import existing, stored_parameters
from engine.doctor.findings import FAILURE, Finding
from engine.doctor.meeting import Meeting
from engine.errors import EngineError
from engine.runtime.distributed import World
from tests.commands import command, flags
from tests.processes import run, start

WORKER = str(Path(__file__).parent / "worker.py")


def test_two_processes_that_could_train(demo, tmp_path):
    """All checks pass, the file says what the screen does, and the disk is as it was."""
    out, file = tmp_path / "run", tmp_path / "found.json"
    out.mkdir()
    settings = flags(**vars(demo), output_dir=out)
    settings[settings.index("--data_file")] = "--train_data_file"
    codes, (said, other) = run(
        ["-m", "engine", "doctor", "--json", str(file), *settings], world_size=2, PYTHONIOENCODING="ascii"
    )
    assert codes == [0, 0] and "Traceback" not in said + other
    assert re.search(r"^2 processes on 1 machine: ", said, re.MULTILINE)
    for line in (
        r"\+ versions: higgs-engine .* torch ", r"\+ settings: ", r"\+ model_path: .* \(\w{12}\)", r"\+ limits: ",
        r"\+ output_dir: .*: writable", r"\+ free: .* GiB, a checkpoint takes about 0\.\d GiB",
        r"\+ rename: atomic \(\d+ renames, \d+ whole readings\)", r"\+ write: [\d,]+ MB/s", r"\+ compute: ",
        r"\+ all-reduce of all 2 ranks: ", r"\+ all-gather of all 2 ranks: ", r" 1,024 .* GB/s .* us .* GB/s .* us$",
    ):  # fmt: skip
        assert re.search(rf"^  .*{line}", said, re.MULTILINE), f"{line}\n{said}"
    found = json.loads(file.read_text())
    assert found["passed"] and [facts["rank"] for facts in found["ranks"]] == [0, 1]
    assert {row["bytes"] for row in found["bandwidth"]} >= {1 << 10, 1 << 20}
    assert list(out.iterdir()) == []


def test_what_is_broken_is_told_before_it_can_hang():
    """A wrong interface name on one machine, and settings that are wrong there, end in seconds."""
    began = time.monotonic()
    codes, (said, other) = run([WORKER, "doctor", "interface", "--learning_rate", "-1"], 2, check=False)
    assert codes == [2, 2] and time.monotonic() - began < 180
    assert "GLOO_SOCKET_IFNAME=nosuch0 is not there for rank 1 (node-1)" in said and "are up: lo" in said
    assert "collectives: not measured" in said and "✗ settings: learning_rate: -1.0 is out of range\n" in said
    assert "✗" not in other, "two voices say the same"


def test_a_network_that_answers_nobody_is_given_up_on():
    codes, (said, _) = run(
        [WORKER, "doctor", "silent_network", "--patience", "3"], 2, check=False, GLOO_SOCKET_IFNAME="lo",
        MASTER_ADDR=own_address(),
    )  # fmt: skip
    assert codes == [2, 2]
    assert re.search(r"✗ collectives: rank 0 \(node-0\): .*[Tt]imed out", said), said


def own_address() -> str:
    """An address of this machine that is not loopback, as MASTER_ADDR has to be for several machines."""
    from engine.doctor.network import interfaces, is_loopback

    known = [address for listed in interfaces().values() for address in listed if ":" not in address]
    found = [address for address in known if not is_loopback(address)]
    if not found:
        pytest.skip("this machine has no network but loopback")
    return found[0]


def test_who_is_missing_is_said_in_time():
    """Rank 0 waits for a second rank that never comes; elsewhere, a rank 1 finds no rank 0."""
    doctor = ["-m", "engine", "doctor", "--patience", "2"]
    started = [start(doctor, 1, WORLD_SIZE="2", RANK=rank)[0] for rank in ("0", "1")]  # each with a port of its own
    first, second = (process.communicate(timeout=180)[0] for process in started)
    assert [process.returncode for process in started] == [2, 2]
    assert "2 processes are expected; rank 1 did not come in 2 s. Here: " in first
    assert re.search(r"rank 1 \(.*\): the meeting place MASTER_ADDR=127.0.0.1, .* cannot be reached: .*refused", second)


def test_alone_without_settings():
    said = command("doctor")
    assert said.code == 0 and said.out.startswith("1 process on 1 machine: ")
    assert "software" in said.out and "compute: " in said.out and "output_dir" not in said.out


def test_mistakes_in_the_settings_are_findings():
    said = command("doctor", "--model_path", "/no/such/model", "--sed", "1", "--json", "/proc/none/found.json")
    assert said.code == 2
    assert "✗ settings: model_path: /no/such/model is not a folder" in said.out
    assert "settings: unknown setting 'sed'" in said.out and "→ did you mean seed?" in said.out
    assert "✗ --json: /proc/none/found.json: No such file or directory" in said.out
    assert "3 failures, 0 warnings in " in said.out


# ---------------------------------------------------------------- parts


def meet(size: int, work) -> list:
    """What `work(meeting)` gives or raises in each of `size` threads that play ranks."""
    server = dist.TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False)
    results: list = [None] * size

    def play(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", server.port, size, False)
        try:
            results[rank] = work(Meeting(store, World(rank, 0, size, torch.device("cpu")), patience_s=1.0))
        except EngineError as error:
            results[rank] = error

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_all_hear_rank_0_and_rank_0_hears_all():
    def work(meeting):
        meeting.greet()
        gathered = meeting.gather("numbers", meeting.world.rank**2)
        return meeting.tell(gathered), meeting.tell("and again")

    assert meet(16, work) == [([rank**2 for rank in range(16)], "and again")] * 16


def test_all_hear_who_has_stopped_half_way():
    def work(meeting):
        meeting.greet()
        if meeting.world.rank not in (2, 3):
            meeting.gather("facts", 1)
            meeting.tell(None)

    results = meet(5, work)
    assert [str(result) for result in results[:2] + results[4:]] == [str(results[0])] * 3
    assert re.match(r"ranks 2-3 \(.*\) had come, but did not get through 'facts' in 1 s → ", str(results[0]))


def test_doors_that_are_closed_are_found():
    with ports.listening("127.0.0.1") as (address, port):
        assert ports.call((3, address, port)) is None
    assert ports.call((3, address, port)) == {"rank": 3, "address": "127.0.0.1", "error": "Connection refused"}


def test_readings_of_a_file_that_is_written_in_place_are_not_whole(tmp_path):
    """The reader of the rename test finds what a file system without atomic renaming would show."""
    target = tmp_path / "file"
    target.write_bytes(disk.CONTENTS[0])
    ends = threading.Event()

    def write_in_place() -> None:
        while not ends.is_set():
            for content in disk.CONTENTS:
                target.write_bytes(content)
            target.unlink()

    writer = threading.Thread(target=write_in_place)
    writer.start()
    try:
        found = disk._read(target)
    finally:
        ends.set()
        writer.join()
    assert found["readings"] > sum(found["wrong"].values()) > 0 and "no file" in found["wrong"]


def test_content_is_told_apart_without_reading_all_of_it(demo, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(demo.model_path, folder, copy_function=shutil.copyfile)  # without times
    mark = software.content(demo.model_path)
    (folder / "notes.md").write_text("where it came from")
    assert mark is not None and software.content(folder) == mark
    (folder / "tokenizer.json").unlink()
    assert software.content(folder) != mark
    file = tmp_path / "data.json"
    marks = []
    for longer, changed in ((0, None), (1, None), (0, 0), (0, 150_001), (0, 299_999)):
        text = bytearray(b"a" * (300_000 + longer))
        if changed is not None:
            text[changed] = ord("b")
        file.write_bytes(text)
        marks.append(software.content(file))
    assert len(set(marks)) == len(marks)
    assert software.content(tmp_path / "nothing") is None
    (tmp_path / "header.json").write_text(json.dumps({"fingerprint": "0123456789abcdef"}))
    assert software.content(tmp_path) == "store 0123456789ab"


def test_parameters_are_counted_from_headers(demo, tmp_path):
    from engine.model.weights import WeightFiles

    shapes = WeightFiles(demo.model_path).shapes.values()
    assert stored_parameters(demo.model_path) == sum(torch.Size(shape).numel() for shape in shapes)
    assert stored_parameters(tmp_path) is None
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    endless = b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 0]}}'
    for content in (b"\xff" * 100, *(len(header).to_bytes(8, "little") + header for header in (deep, endless))):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert stored_parameters(tmp_path) is None


def test_the_folder_that_is_there_is_found_whatever_the_names_below_it(tmp_path):
    assert existing(tmp_path / "new" / ("a" * 300)) == tmp_path


def test_a_terminal_without_unicode_gets_plain_signs():
    text = "  ✗ disk: 3 × full\n      → make room … ü"
    assert report.printable(text, "utf-8") == text
    assert report.printable(text, "ascii") == "  x disk: 3 x full\n      -> make room ... ?"
    assert report.verdict([Finding("disk", FAILURE, "full")]) == "1 failure, 0 warnings in 1 check"
