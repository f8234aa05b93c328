"""The commands that read and write weights: checkpoints, models, adapters. One short function a command."""

import argparse
from pathlib import Path

from engine.cli_options import parser_of
from engine.exit_codes import MISTAKE

DTYPES = ("auto", "float32", "bfloat16", "float16")


def consolidate(argv: list[str]) -> None:
    """Turns a checkpoint into a model folder (full run) or an adapter folder (LoRA run)."""
    parser = parser_of("consolidate", consolidate)
    parser.add_argument("checkpoint", type=Path, help="output_dir/checkpoint-N")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    _how_to_write(parser, "default: bfloat16 for a model, float32 for an adapter; auto: what the run computed in")
    args = parser.parse_args(argv)
    from engine.export.consolidate import consolidate as run
    from engine.export.model_folder import require_free

    require_free(args.out)
    _require_intact(args.checkpoint)
    kind = run(args.checkpoint, args.out, args.dtype, args.max_shard_size)
    print(f"{kind} written to {args.out}")
    if kind == "adapter":
        print(f"next: higgs-engine merge --base_model_path BASE --lora_adapter_path {args.out} --output_path MERGED")


def export(argv: list[str]) -> None:
    """Writes a model for transformers (native) or in the original format (boson), from either."""
    parser = parser_of("export", export)
    parser.add_argument("source", type=Path, help="checkpoint-N of a full run, or a model folder of either format")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    parser.add_argument("--format", choices=("native", "boson"), required=True, help="format to write")
    _how_to_write(parser, "default: as stored, of a checkpoint bfloat16; auto: as stored, or what the run computed in")
    args = parser.parse_args(argv)
    from engine.export.export import export as run

    _require_intact(args.source)
    run(args.source, args.out, args.format, args.dtype, args.max_shard_size)
    print(f"{args.format} model written to {args.out}")


def _require_intact(path: Path) -> None:
    """What is made of a damaged checkpoint would be damaged too, and nobody would know."""
    from engine.checkpoint.manifest import MANIFEST
    from engine.checkpoint.verification import require_intact

    if (path / MANIFEST).is_file():
        require_intact(path)


def _how_to_write(parser: argparse.ArgumentParser, dtypes: str) -> None:
    """The options of what writes weights; `dtypes`: what happens without the flag and with auto."""
    parser.add_argument("--dtype", choices=DTYPES, help=dtypes)
    parser.add_argument("--max_shard_size", default="5GB", help="of a file of weights: 5GB, 500MB, 2GiB (default 5GB)")


def merge(argv: list[str]) -> None:
    """Merges a LoRA adapter into its base model, verified, ready for transformers."""
    parser = parser_of("merge", merge)
    text = "The sun rises in the east and sets in the west."
    add = parser.add_argument
    add("--base_model_path", type=Path, help="folder of the base model, either format; default: what the adapter names")
    add("--lora_adapter_path", type=Path, required=True, help="adapter, LoRA checkpoint-N or a run's folder")
    add("--output_path", type=Path, required=True, help="new folder to write")
    _how_to_write(parser, "default and auto: the dtype of the base model")
    add("--compare_models", action="store_true", help="also compare with the base, and show what changed most")
    add("--test_input", metavar="TEXT", default=text, help=f"text for that (default: {text!r})")
    add("--no_save_tokenizer", action="store_true", help="leave the tokenizer's files out")
    args = parser.parse_args(argv)
    from engine.export.merge import merge as run

    _require_intact(args.lora_adapter_path)
    run(
        args.base_model_path, args.lora_adapter_path, args.output_path, args.dtype or "auto",
        max_shard_size=args.max_shard_size, compare_text=args.test_input if args.compare_models else None,
        save_tokenizer=not args.no_save_tokenizer, say=print,
    )  # fmt: skip
    print(f"merged model written to {args.output_path}")


def adapters(argv: list[str]) -> int:
    """Lists the LoRA adapters below a folder: what each is, how well it did, whether it is whole."""
    parser = parser_of("adapters", adapters)
    parser.add_argument("--path", type=Path, default=Path("."), metavar="DIR", help="where to look (default: here)")
    parser.add_argument("--verbose", action="store_true", help="also show each adapter's tensors")
    args = parser.parse_args(argv)
    from engine.export.adapter_list import find_adapters, table

    found = find_adapters(args.path)
    print("\n".join(table(found, args.verbose)) if found else f"no adapter below {args.path}")
    return 0 if all(adapter.is_sound for adapter in found) else MISTAKE


def verify(argv: list[str]) -> None:
    """Rechecks checkpoints: every file by its hash, every tensor for completeness."""
    parser = parser_of("verify", verify)
    parser.add_argument("path", type=Path, metavar="CHECKPOINT|DIR", help="a checkpoint-N, or all below a folder")
    parser.add_argument("--base_model_path", type=Path, metavar="FOLDER", help="also: are they of this model?")
    args = parser.parse_args(argv)
    from engine.checkpoint.verification import verify as run
    from engine.model.weights import WeightFiles

    run(args.path, args.base_model_path and WeightFiles(args.base_model_path))


def inspect(argv: list[str]) -> None:
    """Shows what is in a checkpoint, a model folder or an adapter folder."""
    parser = parser_of("inspect", inspect)
    parser.add_argument("path", type=Path, metavar="FOLDER", help="checkpoint-N, model folder or adapter folder")
    parser.add_argument("--tensors", action="store_true", help="read every tensor: range, mean, what is not finite")
    args = parser.parse_args(argv)
    from engine.checkpoint.inspection import inspect as run

    for line in run(args.path, args.tensors):
        print(line)


def convert_checkpoint(argv: list[str]) -> None:
    """Takes a checkpoint to plain DeepSpeed, or the weights out of one that DeepSpeed wrote."""
    parser = parser_of("convert-checkpoint", convert_checkpoint)
    parser.add_argument("checkpoint", type=Path, help="checkpoint-N, or for --to model a DeepSpeed checkpoint")
    parser.add_argument("--to", choices=("universal", "model"), required=True, help="what to make of it")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    parser.add_argument("--base_model_path", type=Path, metavar="FOLDER", help="--to model: the model it began with")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="--to model; auto: the dtype of the base model")
    args = parser.parse_args(argv)
    _require_intact(args.checkpoint)
    if args.to == "universal":
        from engine.export.universal import to_universal

        tag = to_universal(args.checkpoint, args.out)
        print(f"universal checkpoint {tag} written to {args.out}")
        print('next: load_checkpoint of that folder; in the DeepSpeed config {"checkpoint": {"load_universal": true}}')
        return
    if args.base_model_path is None:
        parser.error("--to model needs --base_model_path: configuration and tokenizer are the base model's")
    from engine.export.foreign import to_model
    from engine.model.weights import WeightFiles

    to_model(args.checkpoint, WeightFiles(args.base_model_path), args.out, args.dtype)
    print(f"model written to {args.out}; train on from it with --model_path {args.out}")
