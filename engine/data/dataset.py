"""What a run trains on: one or several prepared stores, or a part of them, as one numbered list of samples.

Data files that are no stores yet are prepared first, into the run's own folder. In memory is only a small record of
each sample (its length and its targets, 24 bytes); samples are cut from the mapped files when they are asked for.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engine.config import Settings
from engine.data.encoder import FRAMES_PER_SECOND
from engine.data.labels import Sample
from engine.data.mels import MelExtractor
from engine.data.mixture import Mixture
from engine.data.prepare import identity_of, made_from, prepare
from engine.data.store import Store, is_store
from engine.errors import DataError
from engine.runtime.distributed import World


class Dataset:
    """Samples of stores.

    Args:
        stores: one after the other.
        weights: of each store, see engine/data/mixture.py.
        chosen: int64, increasing; which of all samples it has; None: all.
        dropped: one line for each sample that was left out as too long.

    Attributes:
        chosen: as given, or all.
        lengths: int32 [n]; positions of each sample.
        text_targets, audio_targets: int32 [n]; the latter of each codebook.
        audio_frames: int32 [n]; positions that are audio, of reference and target.
    """

    def __init__(
        self,
        stores: list[Store],
        weights: list[float] | None = None,
        chosen: np.ndarray | None = None,
        dropped: tuple[str, ...] = (),
    ):
        self.stores, self.weights, self.dropped = stores, weights, dropped
        sizes = [len(store) for store in stores]
        self._ends = np.cumsum(sizes)
        self.chosen = np.arange(sum(sizes)) if chosen is None else chosen
        records = np.concatenate([store.records for store in stores])[self.chosen]
        self.lengths, self.audio_frames = records["length"].copy(), records["audio_frames"].copy()
        self.text_targets, self.audio_targets = records["text_targets"].copy(), records["audio_targets"].copy()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        number = int(self.chosen[index])
        store = int(np.searchsorted(self._ends, number, side="right"))
        return self.stores[store].sample(number - int(self._ends[store]) + len(self.stores[store]))

    @property
    def codebooks(self) -> int:
        return self.stores[0].stream.codebooks

    @property
    def fingerprint(self) -> str:
        """Equal for equal samples in equal order."""
        digest = hashlib.sha256("".join(store.fingerprint for store in self.stores).encode())
        digest.update(np.ascontiguousarray(self.chosen, "<i8").data)
        return digest.hexdigest()

    @property
    def rows(self) -> np.ndarray:
        """int64 [n]; row of its data file of each sample."""
        return np.concatenate([store.records["row"] for store in self.stores])[self.chosen]

    def names(self, indices: Sequence[int]) -> list[str]:
        """What users find samples by: the row of the data file, after the store where there are several."""
        rows, stores = self.rows, self.store_of_sample()
        folders = [f"{store.folder.name} " if len(self.stores) > 1 else "" for store in self.stores]
        return [f"{folders[stores[i]]}row {rows[i]}" for i in indices]

    def store_of_sample(self) -> np.ndarray:
        """int64 [n]."""
        return np.searchsorted(self._ends, self.chosen, side="right")

    def subset(self, indices: np.ndarray, weighted: bool = True) -> "Dataset":
        """Some of its samples; `weighted` false: an epoch has each of them once."""
        return Dataset(self.stores, self.weights if weighted else None, self.chosen[np.sort(indices)], self.dropped)

    def mixture(self, seed: int) -> Mixture:
        """The samples of each epoch in their order."""
        parts = [store.part_of_sample for store in self.stores]
        firsts = np.cumsum([0] + [len(store.parts) for store in self.stores])
        block = np.concatenate([first + part for first, part in zip(firsts, parts, strict=False)])[self.chosen]
        sizes = np.bincount(block, minlength=firsts[-1])
        blocks = [[size for size in sizes[a:b] if size] for a, b in zip(firsts, firsts[1:], strict=False)]
        weights = self.weights or [1.0] * len(self.stores)
        kept = [(sizes, weight) for sizes, weight in zip(blocks, weights, strict=True) if sizes]
        return Mixture([sizes for sizes, _ in kept], [weight for _, weight in kept], seed)

    def within(self, max_tokens: int | None, drop_long: bool) -> "Dataset":
        """Itself, or without the samples that are longer than a micro-batch.

        Raises:
            DataError: there are such samples and `drop_long` is false, or nothing is left.
        """
        long = np.flatnonzero(self.lengths > max_tokens) if max_tokens is not None else np.empty(0, np.int64)
        if not len(long):
            return self
        lines = [
            f"{name}: {self.lengths[i]:,} tokens ({self.audio_frames[i] / FRAMES_PER_SECOND:.1f} s of audio)"
            for i, name in zip(long, self.names(long), strict=True)
        ]
        if not drop_long:
            raise DataError(
                f"{len(long)} of {len(self)} samples are longer than max_tokens_per_micro_batch = {max_tokens:,} → "
                f"raise it to {self.lengths.max():,} or more, shorten them, or set drop_long_samples:",
                lines,
            )
        if len(long) == len(self):
            raise DataError(f"no sample is left to train on; all are over {max_tokens:,} tokens.", lines)
        kept = np.delete(np.arange(len(self)), long)
        return Dataset(self.stores, self.weights, self.chosen[kept], tuple(lines))

    def describe(self) -> str:
        tokens, frames = int(self.lengths.sum()), int(self.audio_frames.sum())
        minutes = frames / FRAMES_PER_SECOND / 60
        line = f"{len(self):,} samples, {tokens:,} tokens, {minutes:,.1f} min of audio (references included)"
        return line + (f"; {len(self.dropped)} too long and left out" if self.dropped else "")


def open_data(
    name: str, sources: list[str], settings: Settings, tokenizer, config, world: World,
    mels: MelExtractor | None, reuse: bool, say: Callable[[str], None],
) -> Dataset:  # fmt: skip
    """The data of a run; what is no store yet is prepared into `output_dir/data`. Every process calls it.

    Args:
        name: train or eval.
        reuse: take what an earlier start of this run prepared, if the data file is still the same.

    Raises:
        DataError: bad rows, or a store that does not fit the run.
    """
    stores = []
    wanted = identity_of(settings, tokenizer, mels)
    for number, source in enumerate(sources):
        if is_store(source):
            store = Store(source)
        else:
            folder = Path(settings.output_dir) / "data" / f"{name}-{number}"
            store = _prepared_before(folder, source, settings, wanted) if reuse else None
            if store is None:
                store = prepare(source, folder, settings, tokenizer, config, world, mels, say)
        require_fit(store, wanted, config)
        stores.append(store)
    weights = settings.data_weights if name == "train" else None
    return Dataset(stores, weights)


def _prepared_before(folder: Path, source: str, settings: Settings, wanted: dict) -> Store | None:
    if not is_store(folder):
        return None
    header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
    same = header.get("made_from") == made_from(source, settings) and header.get("identity") == wanted
    return Store(folder) if same else None


def require_fit(store: Store, wanted: dict, config) -> None:
    """Raises DataError unless the store's samples are those that this run would make."""
    found = store.header["identity"]
    problems = [
        f"{key}: the store has {found.get(key)!r}, this run {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value and not (key == "codec" and value is None)
    ]
    stream = (config.num_codebooks, config.audio_stream_bos_id, config.audio_stream_eos_id)
    mine = (store.stream.codebooks, store.stream.bos, store.stream.eos)
    if mine != stream:
        problems.append(f"codebooks, BOS and EOS: the store has {mine}, the model {stream}")
    if problems:
        raise DataError(
            f"{store.folder}: the store does not fit this run → give the settings it was prepared with, or prepare it "
            "again for this model (codes come from the cache):",
            problems,
        )


def write_dropped(dataset: Dataset, file: Path, log: Callable[[str], None]) -> None:
    """Names every sample that was left out: the first few in the log, all of them in `file`."""
    if dataset.dropped:
        file.write_text(json.dumps(dataset.dropped, indent=1))
        log(f"left out as too long ({len(dataset.dropped)}, all in {file.name}):")
        for line in dataset.dropped[:10]:
            log(f"  {line}")
