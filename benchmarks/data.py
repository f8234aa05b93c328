"""The road of the data, stage by stage: import, encode, prepare, open, plan, load; each against its target.

    import      rows of ChatML read and checked, from JSON and JSONL
    encode      recordings to cached codes, with the demo's small codec and with one that costs nothing: what reading,
                measuring and keeping take beside the codec, which is the part that is ours
    prepare     data file to store, codes cached
    open        stores of two sizes, and the Dataset of the larger, which reads its records into memory
    plan        one epoch of the larger store
    loader      packed rows in the process itself and from one worker; and the private memory of both processes, over
                both stores: page cache is not in it, for the system may take that back at any time

The data are made up (benchmarks/synthetic_data.py) and just written, so files come from the page cache: these are the
costs of this engine, not of a disk. What is timed is checked first. The defaults take about two minutes, 1.5 GB of disk
and one core, the loader two.
"""

import argparse
import gc
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import transformers

import engine
from benchmarks import loader_memory
from benchmarks import synthetic_data as made
from benchmarks.loader_memory import MAX_TOKENS, batches, micro_batches, plan_of
from benchmarks.measured import Result, table_line
from benchmarks.stopwatch import hardware
from engine.config import Settings
from engine.data.audio import Recording, content_key
from engine.data.code_cache import CodeCache
from engine.data.codec import Codec, codec_identity, encode_missing
from engine.data.dataset import Dataset
from engine.data.demo import make_demo
from engine.data.formats import json_rows, read_rows
from engine.data.labels import merge
from engine.data.prepare import prepare
from engine.data.store import Store
from engine.model.weights import WeightFiles, load_tokenizer
from engine.runtime.distributed import World

CPU = torch.device("cpu")

TARGETS = {
    "open_small": ("<", 50), "open_large": ("<", 50), "plan": ("<", 5), "loader_one_worker": (">", 500_000),
    "memory_worker": ("<", 8), "memory_process": ("<", 64),
}  # fmt: skip
"""Of the medians, in the units they are printed in. Of memory: none that grows with the data, but a few numbers a
sample that the process keeps to plan with: 64 bytes are eight of them, and 8 MiB what two runs over one store may
differ by."""

QUICK = dict(import_rows=300, clips=12, encoded=2, samples=200, times=5, packed_rows=12, repeats=1)


def parse_arguments() -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--import_rows", type=int, default=20_000, metavar="N", help="rows of the imported files")
    add("--clips", type=int, default=300, metavar="N", help="recordings, and rows that are prepared")
    add("--encoded", type=int, default=20, metavar="N", help="of them encoded with the demo's codec")
    add("--samples", type=int, default=10_000, metavar="N", help="of the smaller store")
    add("--times", type=int, default=100, metavar="N", help="the larger store is so many times as large")
    add("--packed_rows", type=int, default=400, metavar="N", help="rows that the loader packs")
    add("--repeats", type=int, default=5, metavar="N", help="timed runs of each")
    add("--seed", type=int, default=0, metavar="N", help="of the data")
    add("--quick", action="store_true", help="tiny sizes without targets, to see that it runs")
    add("--demo", type=Path, metavar="FOLDER", help="a demo that is there already; none: one is made")
    add("--out", type=Path, metavar="FILE", help="JSON to write; none: named after device and day in results/")
    args = parser.parse_args()
    vars(args).update(QUICK if args.quick else {})
    return args


class Benchmark:
    """All stages, in a folder of its own."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.results: dict[str, Result] = {}
        self.checks: dict[str, bool] = {}
        self.demo = make_demo(args.demo or folder / "demo")
        self.recordings = made.write_recordings(folder / "audio", args.clips, args.seed)

    def run(self) -> None:
        for stage in (self.read, self.encode, self.prepare, self.write, self.open, self.plan, self.load, self.memory):
            print(f"{stage.__name__} ...", flush=True)
            stage()

    def check(self, name: str, passed: bool) -> None:
        self.checks[name] = bool(passed)
        if not passed:
            raise SystemExit(f"not timed, for it is wrong: {name}")

    def result(self, name: str, title: str, unit: str, values: Sequence[float]) -> None:
        self.results[name] = Result(title, unit, list(values), None if self.args.quick else TARGETS.get(name))

    def seconds(self, work: Callable[[], object]) -> list[float]:
        taken = []
        for _ in range(self.args.repeats):
            gc.collect()
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        return taken

    # ---------------------------------------------------------------- data files

    def read(self) -> None:
        count, rows = self.args.import_rows, {}
        for suffix in ("json", "jsonl"):
            file = self.folder / "audio" / f"import.{suffix}"
            json_rows.write_rows(made.chatml_rows(self.recordings, count, self.args.seed), file)
            rows[suffix] = list(read_rows(file))
            self.check(f"import {suffix}: no problems", not any(row.problems for row in rows[suffix]))
        self.check("JSON and JSONL give the same rows", rows["json"] == rows["jsonl"] and len(rows["json"]) == count)
        del rows
        for suffix in ("json", "jsonl"):
            file = self.folder / "audio" / f"import.{suffix}"
            taken = self.seconds(lambda file=file: sum(1 for _ in read_rows(file)))
            self.result(f"import_{suffix}", f"import, ChatML {suffix.upper()}", "rows/s", [count / s for s in taken])

    def encode(self) -> None:
        """Leaves a cache with codes of all recordings, of which `prepare` makes a store."""
        found = (Recording(path=str(self.folder / "audio" / name)) for name, _ in self.recordings)
        recordings = {content_key(recording): recording for recording in found}
        demo = Codec.load(self.demo.audio_tokenizer_path)
        few = dict(list(recordings.items())[: self.args.encoded])
        for name, codec, chosen in (("demo", demo, few), ("none", FreeCodec(demo), recordings)):
            caches = []

            def encode(chosen=chosen, codec=codec, caches=caches):
                caches.append(CodeCache(tempfile.mkdtemp(dir=self.folder), self._identity))
                self.check("encode: no problems", not encode_missing(chosen, lambda: codec, caches[-1]))

            taken = self.seconds(encode)
            self.cache = caches[-1]
            self.check(f"encode, codec {name}: all cached", all(key in self.cache for key in chosen))
            audio = sum(self.cache.facts(key).seconds for key in chosen)
            title = "encode, with the demo's small codec" if name == "demo" else "encode, beside the codec"
            self.result(f"encode_{name}", title, "s of audio/s", [audio / s for s in taken])
            self.result(f"encode_{name}_clips", f"{title}, clips", "clips/s", [len(chosen) / s for s in taken])

    @property
    def _identity(self) -> str:
        return codec_identity(self.demo.audio_tokenizer_path)

    def prepare(self) -> None:
        file, out = self.folder / "audio" / "prepared.json", self.folder / "prepared"
        json_rows.write_rows(made.chatml_rows(self.recordings, self.args.clips, self.args.seed), file)
        settings = Settings(
            audio_tokenizer_path=str(self.demo.audio_tokenizer_path), codes_cache_dir=str(self.cache.folder.parent)
        )
        tokenizer = load_tokenizer(self.demo.model_path)
        config = WeightFiles(self.demo.model_path).config

        def work():
            prepare(str(file), out, settings, tokenizer, config, World(0, 0, 1, CPU), say=lambda line: None)

        taken = self.seconds(work)
        data = Dataset([Store(out)])
        self.check("prepare: every row is in the store", len(data) == self.args.clips)
        self.result("prepare", "prepare, codes cached", "rows/s", [len(data) / s for s in taken])
        tokens = int(data.lengths.sum())
        self.result("prepare_tokens", "prepare, codes cached, tokens", "tokens/s", [tokens / s for s in taken])

    # ---------------------------------------------------------------- stores

    def write(self) -> None:
        samples = list(made.random_samples(self.args.samples, self.args.seed))
        folders = iter([self.folder / "small", *(self.folder / f"small-{i}" for i in range(1, self.args.repeats))])
        taken = self.seconds(lambda: made.write_store(next(folders), samples))
        self.result("store_write", "store, written", "samples/s", [len(samples) / s for s in taken])
        made.multiply_store(self.folder / "small", self.args.times, self.folder / "large")
        small, large = Dataset([Store(self.folder / "small")]), Dataset([Store(self.folder / "large")])
        self.check("the larger store is so many times as large", len(large) == self.args.times * len(samples))
        for i in range(0, len(samples), max(1, len(samples) // 50)):
            prompt, clips = samples[i]
            wanted = merge(prompt, [codes for _, codes, _ in clips], made.SPECIAL, made.STREAM, i)
            again = large[(self.args.times - 1) * len(samples) + i]
            self.check("samples are what was written", _equal(small[i], wanted) and len(wanted) == small.lengths[i])
            self.check("also those of the larger store", _equal(again, wanted, but=("row",)))

    def open(self) -> None:
        for name in ("small", "large"):
            folder = self.folder / name
            title = f"store of {len(Store(folder)):,} samples, opened"
            self.result(
                f"open_{name}", title, "ms", [1e3 * s for s in self.seconds(lambda folder=folder: Store(folder))]
            )
        store = Store(self.folder / "large")
        title = f"its {len(store):,} records, read as a Dataset"
        self.result("dataset", title, "ms", [1e3 * s for s in self.seconds(lambda: Dataset([store]))])

    def plan(self) -> None:
        data = Dataset([Store(self.folder / "large")])
        seen = np.bincount([i for row in micro_batches(data) for i in row], minlength=len(data))
        self.check("the plan has every sample once", (seen == 1).all())
        self.result("plan", f"plan of {len(data):,} samples", "s", self.seconds(lambda: plan_of(data).epoch(0)))

    def load(self) -> None:
        data = Dataset([Store(self.folder / "small")])
        rows = micro_batches(data)[: self.args.packed_rows]
        first = [list(batches(data, rows[:8], workers)) for workers in (0, 1)]
        pairs = zip(*first, strict=True)
        self.check("a worker's rows are those of the process itself", all(_equal(a, b) for a, b in pairs))
        tokens = int(data.lengths[[i for row in rows for i in row]].sum())
        for name, title, workers in (("in_process", "no worker", 0), ("one_worker", "one worker", 1)):
            own = []  # CPU time of this process, which trains

            def load(workers=workers, own=own):
                before = time.process_time()
                for _ in batches(data, rows, workers):
                    pass
                own.append(1e3 * (time.process_time() - before) / len(rows))

            self.result(f"loader_{name}", f"loader, {title}", "tokens/s", [tokens / s for s in self.seconds(load)])
            self.result(f"loader_{name}_own", f"loader, {title}: the process itself", "ms CPU a row", own)
        order = np.random.default_rng(self.args.seed).integers(0, len(data), 2000)
        microseconds = []
        for i in order.tolist():
            start = time.perf_counter()
            data[i]
            microseconds.append(1e6 * (time.perf_counter() - start))
        self.result("sample", "one sample from the store, median", "µs", [statistics.median(microseconds)])
        self.result("sample_p99", "one sample from the store, 99th percentile", "µs", [np.quantile(microseconds, 0.99)])

    def memory(self) -> None:
        if not Path("/proc/self/smaps_rollup").exists():
            return
        found = {"small": [], "large": []}
        measure = loader_memory.measure if self.args.quick else loader_memory.in_new_process
        for _ in range(min(3, self.args.repeats)):
            for name, runs in found.items():
                runs.append(measure(self.folder / name, self.args.packed_rows))
        for of, title in (("worker", "the worker"), ("process", "the process that plans")):
            for name, runs in found.items():
                what = f"memory of {title}, store of {runs[0]['samples']:,} samples"
                self.result(f"memory_{of}_{name}", what, "MiB", [run[of] / 2**20 for run in runs])
        grown = {of: [b[of] - a[of] for a, b in zip(*found.values(), strict=True)] for of in ("worker", "process")}
        more = found["large"][0]["samples"] - found["small"][0]["samples"]
        title = f"memory of the worker, more over {self.args.times} times the samples"
        self.result("memory_worker", title, "MiB", [value / 2**20 for value in grown["worker"]])
        title = "memory of the process that plans, its index"
        self.result("memory_process", title, "bytes a sample", [value / more for value in grown["process"]])


class FreeCodec:
    """A codec that takes no time: codes of the right shape."""

    def __init__(self, codec: Codec):
        self.sampling_rate, self.hop_length = codec.sampling_rate, codec.hop_length
        self.num_codebooks, self.codebook_size = codec.num_codebooks, codec.codebook_size

    def encode(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        return [np.zeros((self.num_codebooks, -(-len(wave) // self.hop_length)), np.int16) for wave in waveforms]


def _equal(a, b, but: Sequence[str] = ()) -> bool:
    """Whether two samples or packed rows are the same, field by field."""
    names = a.__dataclass_fields__.keys() - set(but)
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    arrays = (np.ndarray, torch.Tensor)
    return all(x.dtype == y.dtype and np.array_equal(x, y) if isinstance(x, arrays) else x == y for x, y in pairs)


def print_table(report: dict) -> None:
    settings, machine = report["settings"], report["hardware"]
    print(
        f"\n{machine['device']}, {machine['cores']} cores, {machine['threads']} thread(s); medians of "
        f"{settings['repeats']} runs; packed rows of {MAX_TOKENS:,} tokens\n"
    )
    print("| what | median (min – max) | unit | target | |")
    print("|---|---:|---|---:|---|")
    for result in report["results"].values():
        print(table_line(result))


def main() -> None:
    args = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="data-benchmark-") as folder:
        benchmark = Benchmark(args, Path(folder))
        benchmark.run()
    machine = hardware(CPU)
    report = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": machine,
        "versions": {
            "engine": engine.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "numpy": np.__version__, "python": platform.python_version(),
        },
        "settings": {name: value for name, value in vars(args).items() if name not in ("out", "demo")},
        "check": {"passed": all(benchmark.checks.values()), **benchmark.checks},
        "results": {name: result.as_dict() for name, result in benchmark.results.items()},
    }  # fmt: skip
    print_table(report)
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower().replace("(r)", "")).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"data_{slug}_{report['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
