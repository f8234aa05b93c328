"""The command line: `higgs-engine COMMAND`, the same as `python -m engine COMMAND`. One short function a command.

Mistakes that a user can mend are printed without a traceback and end with exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import EngineError

EXIT_MISTAKE = 2
DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name not in COMMANDS:
        print(f"higgs-engine: unknown command {name!r}\n\n{_overview()}", file=sys.stderr)
        return EXIT_MISTAKE
    try:
        return COMMANDS[name](rest) or 0
    except EngineError as error:
        # of several processes one speaks: the one that knows, or the first
        if _rank() == getattr(error, "spokesman", 0):
            print(f"\nhiggs-engine {name}: {error}", file=sys.stderr, flush=True)
        return EXIT_MISTAKE


def _rank() -> int:
    from engine.runtime.distributed import launcher_variables

    return int(launcher_variables(os.environ)["RANK"])


def _overview() -> str:
    lines = [f"  {name:<12} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: higgs-engine COMMAND [options]   (COMMAND --help tells more)", "", *lines])


def train(argv: list[str]) -> int:
    """Fine-tunes a model; usually started by launch/train.sh, which starts all processes."""
    from engine.config import help_text, parse

    if {"-h", "--help"} & set(argv):
        print(help_text("higgs-engine train"))
        return 0
    settings = parse(argv)
    from engine.runtime.distributed import exit_cleanly
    from engine.train import train as run

    run(settings)
    if "WORLD_SIZE" in os.environ:  # a worker of a launcher: leave past gloo's flaky teardown
        exit_cleanly(0)
    return 0


def prepare(argv: list[str]) -> int:
    """Turns data of any format into a prepared store; on all GPUs by `bash launch/train.sh prepare ...`."""
    from engine.config import parse

    parser = _parser("prepare", prepare, settings=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the store; several data files: one in each")
    args, rest = _with_settings(parser, argv)
    settings = parse(rest, "higgs-engine prepare")
    from engine.prepare import prepare_stores
    from engine.runtime.distributed import exit_cleanly

    prepare_stores(settings, args.out.absolute())
    if "WORLD_SIZE" in os.environ:
        exit_cleanly(0)
    return 0


def validate(argv: list[str]) -> int:
    """Checks every row of a data set and writes a report; `--show ROW` shows one sample in full."""
    from engine.config import parse

    parser = _parser("validate", validate, settings=True)
    parser.add_argument("--report", type=Path, default=Path("data-report"), help="folder of the report")
    parser.add_argument("--show", type=int, metavar="ROW", help="print turns, tokens, delay grid and labels of a row")
    args, rest = _with_settings(parser, argv)
    needed_anyway = () if args.show is not None else ("model_path", "audio_tokenizer_path")
    settings = parse(rest, "higgs-engine validate", optional=needed_anyway)
    from engine.prepare import show_row, validate_all

    if args.show is not None:
        print(show_row(settings, args.show))
        return 0
    return 0 if validate_all(settings, args.report.absolute()) else EXIT_MISTAKE


def convert(argv: list[str]) -> None:
    """Rewrites data in another format, refusing whatever would lose something."""
    from engine.data.formats import FORMATS
    from engine.data.formats import convert as run

    listing = "\n".join(f"  {name:<15} {format.summary}" for name, format in FORMATS.items())
    parser = _parser("convert", convert, epilog=f"formats:\n{listing}")
    parser.add_argument("source", type=Path, help="data file or folder")
    parser.add_argument("target", type=Path, help="new data file or folder")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format to write")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="format of the source")
    args = parser.parse_args(argv)
    rows = run(args.source, args.target, args.to, args.format)
    print(f"{rows:,} rows written to {args.target}")


def consolidate(argv: list[str]) -> None:
    """Turns a checkpoint into a model folder (full run) or an adapter folder (LoRA run)."""
    parser = _parser("consolidate", consolidate)
    parser.add_argument("checkpoint", type=Path, help="output_dir/checkpoint-N")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: the dtype that the run computed in")
    args = parser.parse_args(argv)
    from engine.checkpoint.consolidate import consolidate as run
    from engine.checkpoint.model_folder import require_free

    require_free(args.out)
    kind = run(args.checkpoint, args.out, args.dtype)
    print(f"{kind} written to {args.out}")
    if kind == "adapter":
        print(f"next: higgs-engine merge --base_model_path BASE --lora_adapter_path {args.out} --output_path MERGED")


def merge(argv: list[str]) -> None:
    """Merges a LoRA adapter into its base model, ready for transformers."""
    parser = _parser("merge", merge)
    parser.add_argument("--base_model_path", type=Path, required=True, help="folder of the base model, either format")
    parser.add_argument("--lora_adapter_path", type=Path, required=True, help="adapter folder, or a LoRA checkpoint-N")
    parser.add_argument("--output_path", type=Path, required=True, help="new folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: the dtype of the base model")
    args = parser.parse_args(argv)
    from engine.checkpoint.merge import merge as run

    run(args.base_model_path, args.lora_adapter_path, args.output_path, args.dtype)
    print(f"merged model written to {args.output_path}")


def demo(argv: list[str]) -> None:
    """Trains a small random Higgs on speech-like data that it makes itself, end to end, in about a minute."""
    parser = _parser("demo", demo)
    parser.add_argument("--folder", type=Path, default=Path("output/demo"), help="where everything goes")
    parser.add_argument("--recordings", type=Path, help="folder of name.wav + name.txt to train on instead")
    args, settings = parser.parse_known_args(argv)
    from engine.demo import run

    run(args.folder, args.recordings, settings)


def _parser(name: str, command: Callable, settings: bool = False, epilog: str = "") -> argparse.ArgumentParser:
    """`settings`: the command also takes those of training, and its --help is followed by theirs."""
    return argparse.ArgumentParser(
        prog=f"higgs-engine {name}",
        description=command.__doc__,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=not settings,
        allow_abbrev=False,
    )


def _with_settings(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, and the settings that follow."""
    if {"-h", "--help"} & set(argv):
        from engine.config import help_text

        print(parser.format_help())
        print(help_text(parser.prog))
        raise SystemExit(0)
    return parser.parse_known_args(argv)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train,
    "prepare": prepare,
    "validate": validate,
    "convert": convert,
    "consolidate": consolidate,
    "merge": merge,
    "demo": demo,
}
