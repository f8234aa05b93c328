"""`higgs-engine evaluate`: the metrics of a model, an adapter or a checkpoint on held-out data, on any backend."""

import json
from dataclasses import replace
from pathlib import Path

from engine.checkpoint.manifest import write_atomically
from engine.config import Settings, prepare_output_dir
from engine.errors import EngineError
from engine.exit_codes import DONE
from engine.held_out import HeldOut
from engine.higgs_engine import HiggsEngine
from engine.model.weights import WeightFiles
from engine.observe.progress import Progress
from engine.observe.schema import BY_NAME
from engine.on_all_processes import on_all_processes
from engine.rows import Rows
from engine.run_sets import Sets
from engine.runtime import activity
from engine.runtime.distributed import World, on_main
from engine.runtime.signals import StopRequests

LEAST_TRAINED = "model.norm"
"""Nothing is trained, so gradients and moments need no memory; but every backend wants something that could be."""


def evaluate(settings: Settings, checkpoint: Path | None, out: Path) -> int:
    """Every process of the launcher calls it with the same settings; returns the exit code.

    Args:
        checkpoint: weights to take from a checkpoint of any backend; None: those of `model_path`, and of
            `lora_adapter_path` with LoRA.
        out: JSON file to write, with the folder for what has to be prepared beside it.

    Raises:
        EngineError: data, model or checkpoint do not fit, or the loss is not finite.
    """
    settings = replace(
        settings, output_dir=str(out.parent / f"{out.stem}-data"), resume="none",
        micro_batches_per_step=None, gradient_accumulation_steps=None,
    )  # fmt: skip
    return on_all_processes(settings, lambda world, stop: _evaluate(settings, checkpoint, out, world, stop))


def _evaluate(settings: Settings, checkpoint: Path | None, out: Path, world: World, stop: StopRequests) -> int:
    settings = settings.with_resolved(world.size, world.device.type == "cuda")
    if not settings.use_lora:
        settings = replace(settings, train_modules=[LEAST_TRAINED], freeze_llm=False)
    say = Progress(world).say
    on_main(world, lambda: prepare_output_dir(settings))
    files = WeightFiles(settings.model_path)
    activity.current.outside("reading the data")
    rows = Rows(settings, world, files.config.audio_token_id)
    held_out = HeldOut(Sets(settings, world, files, reuse=True, say=say).held_out(), settings, world, rows)
    activity.current.outside("loading the model")
    engine = HiggsEngine(settings, world, files, rounds=1)
    if checkpoint is not None:
        engine.load_weights(checkpoint)
    activity.current.enter("evaluate", step=0)
    values = held_out.evaluate(engine)
    activity.current.outside("end of the evaluation")
    what = str(checkpoint or settings.lora_adapter_path or settings.model_path)
    if world.is_main:
        data = {"samples": len(held_out.data), "files": settings.eval_data_file or settings.train_data_file}
        write_atomically(out, json.dumps({"of": what, "data": data, "metrics": values}, indent=1))
    for line in table(values):
        say(line)
    say(f"written to {out}")
    if values["loss"] is None:
        raise EngineError(f"{what}: the loss is not finite → look at its weights with `higgs-engine inspect`.")
    return DONE


def table(values: dict) -> list[str]:
    """A line for text, for each codebook, for all codebooks and for ends of clips."""
    rows = [("text", values["text_loss"], values["text_accuracy"])]
    books = zip(values["codebook_losses"], values["codebook_accuracies"], strict=True)
    rows += [(f"codebook {number}", *book) for number, book in enumerate(books)]
    for name, key in (("audio", "audio"), ("end of clip", "eos")):
        rows.append((name, values[f"{key}_loss"], values[f"{key}_accuracy"]))
    lines = [f"{'':<12} {'loss':>8} {'accuracy':>9}"]
    for name, loss, accuracy in rows:
        lines.append(f"{name:<12} {_shown(loss, '8.4f'):>8} {_shown(accuracy, '9.1%'):>9}")
    return [*lines, f"loss {_shown(values['loss'], '.4f')}: {BY_NAME['loss'].meaning}"]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
