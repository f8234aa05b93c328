"""`validation_split`: a share of the training data set aside to evaluate on, such that it says something.

Samples that share a voice are not spread over both sides if it can be helped: whole speakers are set aside where the
data name several, else all samples of a reference recording, else single clips. It cannot be helped where no choice of
them comes near the share: of two speakers neither is a tenth of the data. A target recording never stands on both
sides, however many rows have it. A function of data and seed, written into the run's folder.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.data.dataset import Dataset
from engine.data.references import draw
from engine.errors import DataError

FACTOR = 2
"""How far the samples set aside may be from the share asked for, unless a single recording has more of them."""


@dataclass(frozen=True)
class Split:
    """
    Attributes:
        by: speaker, reference or clip.
        train, evaluation: int64; numbers of samples, increasing; neither is empty.
    """

    by: str
    train: np.ndarray
    evaluation: np.ndarray

    def write(self, file: Path, data: Dataset) -> None:
        """Names the rows that were set aside, by store."""
        stores, rows = data.store_of_sample(), data.rows
        aside = {
            str(data.stores[number].folder): sorted(rows[self.evaluation[stores[self.evaluation] == number]].tolist())
            for number in range(len(data.stores))
        }
        about = {"by": self.by, "train": len(self.train), "evaluation": len(self.evaluation), "evaluation_rows": aside}
        file.write_text(json.dumps(about, indent=1))


def split(data: Dataset, share: float, seed: int) -> Split:
    """Sets aside about `share` of the samples in whole groups, at least one sample on each side.

    Raises:
        DataError: all samples have the same target recording, so there is nothing to split.
    """
    speakers, references, targets = _columns(data)
    wanted = min(max(1, round(share * len(data))), len(data) - 1)
    for by, keys in (("speaker", speakers), ("reference", references), ("clip", targets)):
        groups = _joined(keys, targets)
        sizes = np.bincount(groups)
        aside = _drawn(sizes, wanted, seed)
        near = wanted <= FACTOR * sizes[aside].sum()
        tells = len(np.unique(keys)) < len(data)
        if by == "clip" or (tells and len(sizes) > 1 and near):
            break
    if len(sizes) < 2:
        raise DataError(
            "validation_split: all samples have the same target recording → give an eval_data_file, or set it to 0."
        )
    chosen = np.isin(groups, aside or [int(sizes.argmin())])
    return Split(by, np.flatnonzero(~chosen), np.flatnonzero(chosen))


def _drawn(sizes: np.ndarray, wanted: int, seed: int) -> list[int]:
    """Groups in drawn order until `wanted` samples are reached, without those that would go far beyond."""
    limit, aside, count = min(FACTOR * wanted, sizes.sum() - 1), [], 0
    for group in sorted(range(len(sizes)), key=lambda group: draw(seed, "split", group)):
        if count < wanted and count + sizes[group] <= limit:
            aside.append(group)
            count += sizes[group]
    return aside


def _columns(data: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each sample a number of its speaker, its first reference and its first target; equal where these are equal.

    What a sample lacks is a number of its own.
    """
    numbers: dict = defaultdict(lambda: len(numbers))
    speakers, references, targets = [], [], []
    for index, store in enumerate(data.stores):
        names = store.speakers()
        speakers += [names[i] if i >= 0 else (index, row) for row, i in enumerate(store.records["speaker"].tolist())]
        contexts, trained = store.first_clips()
        references += [key or (index, row, "reference") for row, key in enumerate(contexts)]
        targets += [key or (index, row, "target") for row, key in enumerate(trained)]
    return tuple(np.array([numbers[key] for key in column])[data.chosen] for column in (speakers, references, targets))


def _joined(keys: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Groups of equal key, joined where they share a target; numbered from 0 in order of appearance."""
    parent: dict[int, int] = {}

    def root(key: int) -> int:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    first: dict[int, int] = {}
    for key, target in zip(keys.tolist(), targets.tolist(), strict=True):
        joined = first.setdefault(target, key)
        if joined != key:
            parent[root(key)] = root(joined)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(root(key), len(numbers)) for key in keys.tolist()])
