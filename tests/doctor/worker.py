"""A rank of the doctor's tests: every rank plays a machine of its own, and rank 1's is not as it should be.

usage: worker.py preflight FOLDER SETTINGS...      all the troubles below, one preflight each
       worker.py doctor TROUBLE ARGUMENTS...       `higgs-engine doctor ARGUMENTS` with one of them
"""

import contextlib
import importlib.metadata
import json
import os
import resource
import socket
import sys
import time
from pathlib import Path
from unittest import mock

from engine.cli import main
from engine.doctor import filesystem, preflight, software, speed
from engine.errors import EngineError
from engine.runtime.distributed import exit_cleanly

RANK = int(os.environ["RANK"])


def other_version():
    versions = importlib.metadata.version
    return mock.patch.object(
        importlib.metadata, "version", lambda name: "9.9.9" if name == "transformers" else versions(name)
    )


def other_code():
    return mock.patch.object(software, "code_hash", lambda package: "another")


def other_data():
    content = software.content
    return mock.patch.object(software, "content", lambda path: "another" if path.name == "data" else content(path))


def other_clock():
    now = time.time
    return mock.patch.object(time, "time", lambda: now() + 100)


def few_files():
    limits = resource.getrlimit
    return mock.patch.object(resource, "getrlimit", lambda number: (64, 64) if number == 7 else limits(number))


def interface():
    return mock.patch.dict(os.environ, GLOO_SOCKET_IFNAME="nosuch0")


def not_shared():
    """The folder has the same name on both machines, and is another."""
    start = filesystem.Traces.start

    def elsewhere(traces, settings):
        own = Path(settings.output_dir) / "of rank 1"
        own.mkdir(exist_ok=True)
        traces.word = start(traces, settings) | {"place": str(own)}
        return traces.word

    return mock.patch.object(filesystem.Traces, "start", elsewhere)


def not_writable():
    return mock.patch.object(filesystem.Traces, "_write", lambda *_: os.strerror(30))


def silent_network():
    return mock.patch.object(speed, "collectives", lambda world: time.sleep(5))


def fails_to_take_part():
    return mock.patch.object(preflight, "preflight", lambda *_: [])


TROUBLES = (
    other_version, other_code, other_data, other_clock, few_files, not_shared, not_writable, fails_to_take_part,
)  # fmt: skip


def all_preflights(folder: Path, argv: list[str]) -> None:
    """Prints a line of JSON for each: its name, what this rank was told, seconds."""
    from engine.config import parse
    from engine.runtime.distributed import init_process_group

    settings = parse([*argv, "--output_dir", str(folder)])
    world = init_process_group(60)
    preflight.SIGHT_S = 1.0
    for trouble in (contextlib.nullcontext, *TROUBLES):
        patience = 2.0 if trouble is fails_to_take_part else 30.0
        with trouble() if RANK == 1 else contextlib.nullcontext():
            began = time.monotonic()
            try:
                told = [str(f) for f in preflight.preflight(settings, world, patience) if f.level != "ok"]
            except EngineError as error:
                told = [str(error)]
            print(json.dumps([trouble.__name__, told, time.monotonic() - began]), flush=True)


if __name__ == "__main__":
    mode, argument, *rest = sys.argv[1:]
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    socket.gethostname = lambda: f"node-{RANK}"
    if mode == "preflight":
        all_preflights(Path(argument), rest)
        exit_cleanly(0)
    with globals()[argument]() if RANK == 1 else contextlib.nullcontext():
        sys.exit(main(["doctor", *rest]))
