"""README.md of what leaves: where the weights come from, how to load them, and whose licence they are under."""

import fnmatch
import math
from pathlib import Path

from engine.checkpoint.manifest import Manifest, versions
from engine.config import FIELDS, Settings

CARD = "README.md"
BASE_CARD = "BASE_README.md"
"""Name of the base model's own card beside ours."""

LICENCES = ("*licen[cs]e*", "*notice*", "*copying*", "*acceptable_use*", "*use_policy*")

ALWAYS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "micro_batches_per_step",
    "max_tokens_per_micro_batch", "per_device_train_batch_size", "prompt_layout", "bf16", "seed",
)  # fmt: skip
"""Settings that stand in every card; others do where they are not the default."""

SHAPING = ("Data", "Batches", "Optimisation", "Trained parameters")

NATIVE_USE = """\
    from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration

    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(FOLDER, use_text_head=True, dtype="auto")
    processor = AutoProcessor.from_pretrained(FOLDER)  # where the base model came with a processor

Without `use_text_head=True` transformers leaves the trained text head out, and says nothing."""

ORIGINAL_USE = """\
    from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine

    engine = HiggsAudioServeEngine(FOLDER, AUDIO_TOKENIZER_FOLDER, device="cuda")

This is the format of the original `higgs_audio` code. `higgs-engine export FOLDER --format native --out NEW` gives the
one that transformers loads."""


def write_card(folder: Path, manifest: Manifest, settings: Settings, native: bool) -> None:
    """Writes the card into a model folder that holds all other files already; the base's own gets another name."""
    if (folder / CARD).is_file():
        (folder / CARD).replace(folder / BASE_CARD)
    sections = [
        "---\nlicense: other\nlibrary_name: transformers\npipeline_tag: text-to-speech\n---\n\n"
        "# Higgs Audio v2, fine-tuned with Higgs Engine",
        _table(("", ""), _provenance(manifest, settings)),
        "## Use\n\n" + (NATIVE_USE if native else ORIGINAL_USE),
        "## Settings\n\n" + _table(("setting", "value"), _settings(settings)),
        "## Licence\n\n" + _licence(folder),
    ]
    (folder / CARD).write_text("\n\n".join(sections) + "\n")


def _provenance(manifest: Manifest, settings: Settings) -> dict[str, object]:
    data = manifest.plan.get("data", "not known")
    wrote = manifest.versions or versions()
    return {
        "base model": settings.model_path,
        "trained": "all parameters" if not settings.freeze_llm and not settings.train_modules else "chosen parameters",
        "steps": f"{manifest.step:,}",
        "tokens seen": f"{manifest.tokens_seen:,}",
        "fingerprint of the data": ", ".join([data] if isinstance(data, str) else map(str, data)),
        "held-out loss": "not measured" if manifest.eval_loss is None else f"{manifest.eval_loss:.4f}",
        "trained with": ", ".join(f"{name} {version}" for name, version in wrote.items()),
        "written with": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _settings(settings: Settings) -> dict[str, object]:
    """What shaped the weights: no paths, and nothing of how the run was spread and saved."""
    chosen = {name: getattr(settings, name) for name in ALWAYS}
    for name, field in FIELDS.items():
        value, default = getattr(settings, name), getattr(Settings(), name)
        if field.metadata["group"] in SHAPING and not field.metadata["path"] and value != default:
            chosen.setdefault(name, value)
    return chosen


def _table(heading: tuple[str, str], rows: dict[str, object]) -> str:
    lines = [f"| {heading[0]} | {heading[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | `{_shown(value)}` |" for name, value in rows.items())])


def _shown(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _licence(folder: Path) -> str:
    copied = sorted(
        file.name for file in folder.iterdir() if any(fnmatch.fnmatch(file.name.lower(), p) for p in LICENCES)
    )
    files = ", ".join(f"`{name}`" for name in copied) or "none were there; they come with the released model"
    return (
        "These are weights of Higgs Audio v2, changed by training, under Boson AI's community licence for that model, "
        f"which goes with them wherever they go. Licence files of the base model copied here: {files}."
    )
