"""Finds the adapters below a directory and says of each what it is, how well it did, and whether it is whole.

An adapter is a folder with `adapter_config.json` and its weights, of any trainer. A LoRA checkpoint carries the
configuration too, but its adapter is the folder inside and counts once.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.manifest import MANIFEST
from engine.errors import EngineError
from engine.model.adapter_files import PREFIX, STARTS_AT_ZERO, AdapterFiles, NotUsable
from engine.model.adapter_folder import CONFIG, SUBFOLDER, WEIGHTS, weights_file
from engine.model.lora import variant

CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
HEADINGS = ("adapter", "step", "rank/alpha", "targets", "variant", "base", "size", "loss", "state")


@dataclass(frozen=True)
class Found:
    """An adapter, as the words of its line in the table.

    Attributes:
        state: complete, all zero, not finite or damaged, not usable (by this engine), with the reason.
        groups: the tensors by kind, a line each.
    """

    folder: Path
    row: tuple[str, ...]
    state: str
    groups: list[str]

    @property
    def is_sound(self) -> bool:
        return self.state.startswith(("complete", "not usable"))


def find_adapters(root: Path) -> list[Found]:
    """Every adapter below a directory, in the order of their paths, numbers by value.

    Raises:
        EngineError: there is no such directory.
    """
    if not root.is_dir():
        raise EngineError(f"{root} is not a folder → give --path DIR, the folder to look in.")
    return [_look_at(folder, root) for folder in sorted(_folders(root), key=_by_number)]


def _folders(root: Path) -> Iterator[Path]:
    """Hidden folders are drafts or ruins. A configuration without weights is an adapter that lost them."""
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if not name.startswith(".")]
        if CONFIG in files and (MANIFEST not in files or set(WEIGHTS) & set(files)):
            yield Path(folder)


def _by_number(folder: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(folder))]


def _look_at(folder: Path, root: Path) -> Found:
    run, step = _origin(folder)
    file = weights_file(folder)
    size = f"{file.stat().st_size / 1e6:,.1f} MB" if file else ""
    loss = _loss(folder.parent, run, step)
    try:
        adapter = AdapterFiles(folder)
        shape, (state, groups) = _shape(adapter), _state(adapter)
    except EngineError as error:
        shape, groups = ("", "", "", ""), []
        why = str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}{os.sep}")
        state = f"{'not usable' if isinstance(error, NotUsable) else 'damaged'}: {why}"
    name = str(folder.relative_to(root))
    row = (name, "" if step is None else str(step), *shape, size, "" if loss is None else f"{loss:.4f}", state)
    return Found(folder, row, state, groups)


def _shape(adapter: AdapterFiles) -> tuple[str, str, str, str]:
    """Rank/alpha, targets, variant and base, in words."""
    config = adapter.config
    targets = config.target_modules
    whole = f" + {' '.join(sorted(config.modules_to_save))}" if config.modules_to_save else ""
    words = targets if isinstance(targets, str) else " ".join(sorted(targets or ())).replace("_proj", "")
    return f"{config.r}/{config.lora_alpha:g}", words, variant(config) + whole, config.base_model_name_or_path or "?"


def _state(adapter: AdapterFiles) -> tuple[str, list[str]]:
    """Looks at every value. What is missing is told without the base: of A and B each needs the other, of one rank."""
    problems, broken, moved = _pair_problems(adapter), [], bool(adapter.config.modules_to_save)
    groups: dict[str, list] = {}
    for name in adapter.shapes:
        tensor = adapter.read(name).float()
        if not tensor.isfinite().all():
            broken.append(name)
        moved = moved or any(part in name for part in STARTS_AT_ZERO) and bool(tensor.any())
        group = groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), [0, 0, 0.0])
        group[0], group[1], group[2] = group[0] + 1, group[1] + tensor.numel(), group[2] + tensor.square().sum().item()
    lines = [f"    {name.removeprefix(PREFIX)}: {n} tensors, {size:,} values, rms {(square / max(size, 1)) ** 0.5:.2e}"
             for name, (n, size, square) in groups.items()]  # fmt: skip
    if problems:
        return f"damaged: {problems[0]}" + f" (and {len(problems) - 1} more)" * (len(problems) > 1), lines
    if broken:
        return f"not finite: {broken[0]}" + f" (and {len(broken) - 1} more)" * (len(broken) > 1), lines
    return "complete" if moved else "all zero", lines


def _pair_problems(adapter: AdapterFiles) -> list[str]:
    shapes, config = adapter.shapes, adapter.config
    pairs = [(name, name.replace(".lora_A.", ".lora_B.")) for name in shapes if ".lora_A." in name]
    lone = [
        name
        for name in shapes
        if name.endswith(".lora_B.weight") and name.replace(".lora_B.", ".lora_A.") not in shapes
    ]
    problems = [f"{name} has no A" for name in lone]
    ranks = {config.r, *config.rank_pattern.values()}
    for a, b in pairs:
        magnitude = a.replace(".lora_A.weight", ".lora_magnitude_vector")
        if b not in shapes:
            problems.append(f"{b} is missing")
        elif len(shapes[a]) != 2 or len(shapes[b]) != 2 or shapes[a][0] != shapes[b][1] or shapes[a][0] not in ranks:
            problems.append(f"{a} has shape {shapes[a]}, B {shapes[b]}, the rank is {config.r}")
        if config.use_dora and magnitude not in shapes:
            problems.append(f"{magnitude} is missing")
    return problems if shapes else ["no tensors"]


def _origin(folder: Path) -> tuple[Path, int | None]:
    """The run's folder, and the step at which the adapter was saved, if either can be told."""
    checkpoint = folder.parent if folder.name == SUBFOLDER else folder
    if match := CHECKPOINT.search(checkpoint.name):
        return checkpoint.parent, int(match.group(1))
    return checkpoint, _json(checkpoint / "trainer_state.json").get("step")


def _loss(checkpoint: Path, run: Path, step: int | None) -> float | None:
    """The held-out loss of the checkpoint, or the last loss that the run logged up to its step."""
    held_out = _json(checkpoint / MANIFEST).get("eval_loss")
    if held_out is not None or step is None or not (run / "metrics.jsonl").is_file():
        return held_out
    logged = None
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run
        if values.get("step", step + 1) <= step and values.get("loss") is not None:
            logged = values["loss"]
    return logged


def _json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def table(adapters: list[Found], verbose: bool = False) -> list[str]:
    """Lines of a table, with `verbose` each adapter's tensors below its line."""
    rows = [HEADINGS, *(found.row for found in adapters)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS) - 1)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]
    below = [[], *(found.groups if verbose else [] for found in adapters)]
    return [text for line, groups in zip(lines, below, strict=True) for text in (line, *groups)]
