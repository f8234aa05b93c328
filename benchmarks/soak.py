"""Endurance: a run that is killed again and again, at random, has to end as the undisturbed one does.

    python -m benchmarks.soak --minutes 20

Each round trains the demo twice with the same settings through `launch/train.sh` in two processes: once in peace, and
once with `--max_restarts` while a random rank is killed with -9 at random moments, in turn within a step, a save and an
evaluation. Rounds take turns through the backends until the time is over. Then everything ever logged has to be equal,
digit for digit; no half-made file may be left, and neither memory nor open files of a process may have grown.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import psutil
import torch
import transformers

import engine
from benchmarks.stopwatch import hardware
from engine.data.demo import Demo, make_demo
from engine.observe.schema import METRICS
from engine.runtime.activity import FOLDER, read_records

ROOT = Path(__file__).parent.parent
ROUNDS = (
    ("fsdp", ["--backend", "fsdp"]),
    ("zero2, saved in the background", ["--backend", "deepspeed", "--ds_config", "zero2", "--async_save"]),
    ("zero3, LoRA", ["--backend", "deepspeed", "--ds_config", "zero3", "--use_lora"]),
)
PHASES = ("a step", "save", "evaluate")
NOT_COMPARED = {metric.name for metric in METRICS if metric.group in ("throughput", "time", "memory")}
NOT_COMPARED |= {"eta_seconds", "alarm"}
"""Times and memory; and alarms, which are told by what a process has seen since its start."""
FREED_IS_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
"""For the C library: else memory that rows of other lengths have left in pieces looks like a leak for a long while."""
PATIENCE_S = 60.0
"""For a process to come into the phase in which it is to be killed; then it dies in another one."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="begin no further round after them (default 20)")
    parser.add_argument("--steps", type=int, default=200, help="of each run (default 200)")
    parser.add_argument("--pause", type=float, default=10, help="seconds of training between kills, mean (default 10)")
    parser.add_argument("--most_kills", type=int, help="of a run (default: no limit; a slow machine may need one)")
    parser.add_argument("--seed", type=int, default=0, help="of the killer")
    parser.add_argument("--folder", type=Path, help="where runs go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="report (default: below benchmarks/results)")
    return parser.parse_args()


def command(demo: Demo, out: Path, steps: int, flags: list[str]) -> list[str]:
    return [
        "bash", str(ROOT / "launch" / "train.sh"), "--train_data_file", str(demo.data_file),
        "--model_path", str(demo.model_path), "--audio_tokenizer_path", str(demo.audio_tokenizer_path),
        "--codes_cache_dir", str(demo.data_file.parent / "codes"), "--output_dir", str(out), "--max_steps", str(steps),
        "--max_tokens_per_micro_batch", "512", "--drop_long_samples", "--num_train_epochs", "100000",
        "--learning_rate", "1e-4", "--warmup_steps", "10", "--validation_split", "0.2", "--logging_steps", "5",
        "--eval_steps", "20", "--save_steps", "15", "--dataloader_num_workers", "1", "--timeout_s", "60", *flags,
    ]  # fmt: skip


class Killer(threading.Thread):
    """Kills a rank below a launcher now and then, and measures all of them meanwhile.

    Attributes:
        kills: how many, by what the victim was doing.
        sizes: pid -> [(resident bytes, open files), ...], in order of time.
    """

    def __init__(self, launcher: psutil.Process, pause_s: float | None, most: int | None, dice: random.Random):
        super().__init__(daemon=True)
        self.launcher, self.pause_s, self.most, self.dice = launcher, pause_s, most, dice
        self.kills: Counter[str] = Counter()
        self.sizes: dict[int, list[tuple[int, int]]] = {}
        self.over = threading.Event()

    def run(self) -> None:
        left, wanted, now = self._pause(), 0, time.monotonic()
        while not self.over.wait(0.02):
            ranks, before, now = self._training_ranks(), now, time.monotonic()
            for process, _ in ranks:
                self._measure(process)
            self._measure(self.launcher)
            if self.pause_s is None or not ranks or wanted == self.most:
                continue  # starting again is not what is to be tried
            left -= now - before
            if left > 0:
                continue
            phase = PHASES[wanted % len(PHASES)]
            process, doing = self.dice.choice(ranks)
            if (doing if doing in PHASES else "a step") == phase or -left > PATIENCE_S:
                try:
                    process.kill()
                except psutil.Error:
                    continue
                self.kills[phase] += 1
                left, wanted = self._pause(), wanted + 1

    def _pause(self) -> float:
        """Seconds of training until the next kill."""
        return self.dice.expovariate(1 / (self.pause_s or 1))

    def _training_ranks(self) -> list[tuple[psutil.Process, str]]:
        """The ranks that are within their steps, and their phase."""
        found = []
        try:
            for process in self.launcher.children(recursive=True):
                folder = process.environ().get(FOLDER)
                if folder and "RANK" in process.environ():
                    records = {record["pid"]: record for record in read_records(Path(folder))}
                    if (record := records.get(process.pid)) and record["step"] is not None and record["code"] is None:
                        found.append((process, record["phase"]))
        except (psutil.Error, OSError):
            pass
        return found

    def _measure(self, process: psutil.Process) -> None:
        try:
            self.sizes.setdefault(process.pid, []).append((process.memory_info().rss, process.num_fds()))
        except psutil.Error:
            pass


def train(
    demo: Demo, out: Path, steps: int, flags: list[str], pause_s: float | None, most: int | None, dice: random.Random
) -> Killer:
    """One run to its end; everything it says goes to a file beside its folder."""
    env = os.environ | {"HIGGS_ENGINE_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env |= FREED_IS_RETURNED
    with open(out.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command(demo, out, steps, flags), env=env, stdout=log, stderr=subprocess.STDOUT)
        killer = Killer(psutil.Process(process.pid), pause_s, most, dice)
        killer.start()
        code = process.wait()
    killer.over.set()
    killer.join()
    if code:
        raise SystemExit(f"the run ended with {code}:\n" + out.with_suffix(".log").read_text()[-4000:])
    return killer


def curve(out: Path) -> list[dict]:
    """What was logged, without what is not compared."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in NOT_COMPARED} for line in lines]


def leftovers(out: Path) -> list[str]:
    """Files and folders that only a save or a write under way has."""
    half_made = re.compile(r"^\.(?!metadata$)|\.tmp$|incomplete")  # .metadata is DCP's table of contents
    return [str(path.relative_to(out)) for path in out.rglob("*") if half_made.search(path.name)]


def is_whole(out: Path) -> bool:
    verify = [sys.executable, "-m", "engine", "verify", str(out)]
    return subprocess.run(verify, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def growth(sizes: dict[int, list[tuple[int, int]]]) -> tuple[float, int]:
    """The largest growth of a process between the second and the last quarter of its life: share of memory, files.

    What a process takes once, in its first steps and its first save, is in the first quarter.
    """
    memory, files = 0.0, 0
    for series in sizes.values():
        if len(series) >= 40:
            quarter = len(series) // 4
            early, late = series[quarter : 2 * quarter], series[-quarter:]
            memory = max(memory, max(rss for rss, _ in late) / max(rss for rss, _ in early) - 1)
            files = max(files, max(count for _, count in late) - max(count for _, count in early))
    return memory, files


def shared_memory() -> int:
    return len(list(Path("/dev/shm").glob("*")))


def one_round(demo: Demo, folder: Path, name: str, flags: list[str], args: argparse.Namespace, seed: int) -> dict:
    """Both runs of a backend, and what they show."""
    dice = random.Random(seed)
    peace = train(demo, folder / "undisturbed", args.steps, flags, None, None, dice)
    before, began = shared_memory(), time.monotonic()
    again = [*flags, "--max_restarts", "100000"]
    killed = train(demo, folder / "killed", args.steps, again, args.pause, args.most_kills, dice)
    memory, files = growth(peace.sizes)
    supervisor = {pid: sizes for pid, sizes in killed.sizes.items() if pid == killed.launcher.pid}
    supervisor_memory, supervisor_files = growth(supervisor)
    found = {
        "round": name, "kills": dict(killed.kills), "minutes": round((time.monotonic() - began) / 60, 2),
        "lines_compared": len(curve(folder / "killed")),
        "curve_equals_undisturbed": curve(folder / "killed") == curve(folder / "undisturbed"),
        "left_half_made": leftovers(folder / "killed"),
        "checkpoints_whole": is_whole(folder / "killed"),
        "shared_memory_left": shared_memory() - before,
        "memory_growth": round(memory, 4), "open_files_growth": files,
        "launcher_memory_growth": round(supervisor_memory, 4), "launcher_open_files_growth": supervisor_files,
    }  # fmt: skip
    found["passed"] = (
        found["curve_equals_undisturbed"] and not found["left_half_made"] and found["checkpoints_whole"]
        and found["shared_memory_left"] <= 0 and memory < 0.05 and files <= 2
        and supervisor_memory < 0.05 and supervisor_files <= 2
    )  # fmt: skip
    return found


def main() -> int:
    args = parse_arguments()
    began, rounds = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        top = args.folder or Path(temporary)
        demo = make_demo(top)
        while not rounds or time.monotonic() - began < 60 * args.minutes:
            name, flags = ROUNDS[len(rounds) % len(ROUNDS)]
            folder = top / f"round-{len(rounds)}"
            folder.mkdir(parents=True)
            rounds.append(one_round(demo, folder, name, flags, args, args.seed + len(rounds)))
            print(json.dumps(rounds[-1]), flush=True)
    kills = sum((Counter(found["kills"]) for found in rounds), Counter())
    machine = hardware(torch.device("cpu"))
    report = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": machine,
        "versions": {
            "engine": engine.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "settings": {name: value for name, value in vars(args).items() if name not in ("out", "folder")},
        "check": {"passed": all(found["passed"] for found in rounds)},
        "results": {
            "minutes": round((time.monotonic() - began) / 60, 1), "kills": dict(kills), "all_kills": kills.total(),
            "rounds": rounds,
        },
    }  # fmt: skip
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower().replace("(r)", "")).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"soak_{slug}_{report['date']}.json"
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{kills.total()} kills in {report['results']['minutes']} minutes, {len(rounds)} round(s): {out}")
    return 0 if report["check"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
