"""The command line: `higgs-engine COMMAND`, the same as `python -m engine COMMAND`. One short function a command.

Mistakes that a user can mend are printed without a traceback; exit codes are those of engine/exit_codes.py.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import EngineError
from engine.exit_codes import DONE, FAILED, MISTAKE
from engine.runtime import activity

ON_ALL_RANKS = ("train", "prepare", "evaluate", "doctor")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name not in COMMANDS:
        print(f"higgs-engine: unknown command {name!r}\n\n{_overview()}", file=sys.stderr)
        return MISTAKE
    launched = name in ON_ALL_RANKS and _has_launcher()
    if launched:  # a peer that is gone would be told by pages of addresses in torch's libraries, drowning our line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "RANK" in os.environ:
        activity.current.keep(int(os.environ["RANK"]))
    code = FAILED
    try:
        code = COMMANDS[name](rest) or DONE
    except EngineError as error:
        # of several processes one speaks: the one that knows, or the first
        if _rank() == getattr(error, "spokesman", 0):
            print(f"\nhiggs-engine {name}: {error}", file=sys.stderr, flush=True)
        code = error.code
    except Exception:
        if not launched:
            raise
        traceback.print_exc()  # what Python would do; but its teardown may wait for peers that are gone
    finally:
        activity.current.ends(code)
    if launched:
        from engine.runtime.distributed import exit_cleanly

        exit_cleanly(code)
    return code


def _has_launcher() -> bool:
    """Whether this is one of several processes that a launcher has started."""
    return (
        not {"WORLD_SIZE", "OMPI_COMM_WORLD_RANK"}.isdisjoint(os.environ)
        or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    )


def _rank() -> int:
    from engine.runtime.distributed import launcher_variables

    return int(launcher_variables(os.environ)["RANK"])


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: higgs-engine COMMAND [options]   (COMMAND --help tells more)", "", *lines])


def train(argv: list[str]) -> int:
    """Fine-tunes a model; usually started by launch/train.sh, which starts all processes."""
    from engine.config import help_text, parse
    from engine.launch import dry_run

    if {"-h", "--help"} & set(argv):
        print(help_text("higgs-engine train"))
        print(f"What is no setting:\n{dry_run.HELP}")
        return 0
    given = dry_run.without(argv)
    settings = parse(given)
    if len(given) < len(argv):
        dry_run.show_as_rank(settings)
        return 0
    from engine.train import train as run

    return run(settings)


def evaluate(argv: list[str]) -> int:
    """Measures a model, an adapter or a checkpoint on held-out data; on all GPUs by `train.sh evaluate ...`."""
    from engine.config import parse

    parser = _parser("evaluate", evaluate, settings=True, epilog=EVALUATE)
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a checkpoint of a run, and its settings")
    parser.add_argument("--out", type=Path, default=Path("evaluation.json"), help="file to write (evaluation.json)")
    args, rest = _with_settings(parser, argv)
    if args.checkpoint is not None and not {"--config"} & {word.partition("=")[0] for word in rest}:
        rest = ["--config", str(args.checkpoint / "config.yaml"), *rest]
    settings = parse(rest, "higgs-engine evaluate", optional=("train_data_file", "audio_tokenizer_path"))
    from engine.evaluation import evaluate as run

    return run(settings, args.checkpoint and args.checkpoint.absolute(), args.out.absolute())


EVALUATE = """\
a model     --model_path RUN/model --audio_tokenizer_path CODEC --eval_data_file DATA
an adapter  --config RUN/config.yaml --lora_adapter_path RUN/lora_adapters
a checkpoint  --checkpoint RUN/checkpoint-500      its settings are the run's, and what comes after is stronger

without eval_data_file: what validation_split sets aside of train_data_file, as the run did
"""


def generate(argv: list[str]) -> int:
    """Speaks: a text to a wav, or all rows of a data file to a folder, with scores."""
    from engine.data.formats import FORMATS
    from engine.data.layouts import LAYOUTS

    parser = _parser("generate", generate, epilog=GENERATE)
    add = parser.add_argument
    model = "model folder of either format, or a run's output folder or checkpoint-N"
    add("--model_path", type=Path, required=True, metavar="FOLDER", help=model)
    add("--lora_adapter_path", type=Path, metavar="FOLDER", help="adapter for it, merged in memory")
    add("--audio_tokenizer_path", type=Path, metavar="FOLDER", help="the codec; default: that of the run")
    add("--text", help="what to say")
    add("--reference", type=Path, metavar="WAV", help="recording of the voice to say it in")
    add("--reference_text", metavar="TEXT", help="what is said in it; without, it stands in the system turn")
    add("--input", type=Path, metavar="DATA", help="instead: a data file or folder of any format, or a prepared store")
    add("--format", choices=("auto", *FORMATS), default="auto", help="of --input (default: auto)")
    add("--out", type=Path, required=True, help="wav to write, or with --input the new folder for them")
    add("--prompt_layout", choices=("auto", *LAYOUTS), help="turns of the prompt; default: those of the run, else auto")
    add("--scene", metavar="TEXT", help="scene of the system turn; default: that of the run")
    add("--temperature", type=float, help="of the draw of each code; 0: the most likely (default: the model's own)")
    add("--max_seconds", type=float, default=30.0, metavar="S", help="of speech, after which it is cut (default 30)")
    add("--seed", type=int, default=42, help="of the draws; row N of --input has seed + N (default 42)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--asr_model_path", type=Path, metavar="FOLDER", help="speech recogniser of transformers: counts word errors")
    add("--speaker_model_path", type=Path, metavar="FOLDER", help="x-vector model of transformers: compares voices")
    args = parser.parse_args(argv)
    from engine.evaluate.command import Request
    from engine.evaluate.command import generate as run

    return DONE if run(Request(**vars(args))) else MISTAKE


GENERATE = """\
with --input the folder gets 00.wav, 01.wav, ..., references and targets in prompts/, and samples.jsonl with a line of
numbers for each; without a model for them word errors and voice are left out, the other scores need none

exit code 2: some rows could not be spoken; the table says why
"""


def prepare(argv: list[str]) -> int:
    """Turns data of any format into a prepared store; on all GPUs by `bash launch/train.sh prepare ...`."""
    from engine.config import parse

    parser = _parser("prepare", prepare, settings=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the store; several data files: one in each")
    args, rest = _with_settings(parser, argv)
    settings = parse(rest, "higgs-engine prepare")
    from engine.prepare import prepare_stores

    prepare_stores(settings, args.out.absolute())
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
    return 0 if validate_all(settings, args.report.absolute()) else MISTAKE


def plan(argv: list[str]) -> int:
    """Says before a run, without a GPU: memory, what fits, tokens, FLOPs and time of a step and of an epoch."""
    from engine.config import parse

    parser = _parser("plan", plan, settings=True)
    add = parser.add_argument
    add("--gpus", type=int, default=1, metavar="N", help="how many GPUs (default 1)")
    add("--gpu_memory", type=float, default=80, metavar="GIB", help="memory of each (default 80)")
    add("--peak_tflops", type=float, default=989, help="their dense bf16 peak (default 989: H100, H200)")
    add("--efficiency", type=float, default=0.4, help="share of it that training reaches, the MFU (default 0.4)")
    args, rest = _with_settings(parser, argv)
    if min(args.gpus, args.gpu_memory, args.peak_tflops, args.efficiency) <= 0:
        parser.error("--gpus, --gpu_memory, --peak_tflops and --efficiency have to be above 0")
    settings = parse(rest, "higgs-engine plan", optional=("audio_tokenizer_path", "train_data_file"))
    from engine.model.weights import load_config
    from engine.plan.report import Machine, report

    machine = Machine(args.gpus, args.gpu_memory * 2**30, args.peak_tflops * 1e12, args.efficiency)
    lines, fits = report(load_config(settings.model_path), settings, machine)
    print("\n".join(lines))
    return 0 if fits else MISTAKE


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
    parser = _parser("export", export)
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
    parser = _parser("merge", merge)
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
    parser = _parser("adapters", adapters)
    parser.add_argument("--path", type=Path, default=Path("."), metavar="DIR", help="where to look (default: here)")
    parser.add_argument("--verbose", action="store_true", help="also show each adapter's tensors")
    args = parser.parse_args(argv)
    from engine.export.adapter_list import find_adapters, table

    found = find_adapters(args.path)
    print("\n".join(table(found, args.verbose)) if found else f"no adapter below {args.path}")
    return 0 if all(adapter.is_sound for adapter in found) else MISTAKE


def verify(argv: list[str]) -> None:
    """Rechecks checkpoints: every file by its hash, every tensor for completeness."""
    parser = _parser("verify", verify)
    parser.add_argument("path", type=Path, metavar="CHECKPOINT|DIR", help="a checkpoint-N, or all below a folder")
    parser.add_argument("--base_model_path", type=Path, metavar="FOLDER", help="also: are they of this model?")
    args = parser.parse_args(argv)
    from engine.checkpoint.verification import verify as run
    from engine.model.weights import WeightFiles

    run(args.path, args.base_model_path and WeightFiles(args.base_model_path))


def inspect(argv: list[str]) -> None:
    """Shows what is in a checkpoint, a model folder or an adapter folder."""
    parser = _parser("inspect", inspect)
    parser.add_argument("path", type=Path, metavar="FOLDER", help="checkpoint-N, model folder or adapter folder")
    parser.add_argument("--tensors", action="store_true", help="read every tensor: range, mean, what is not finite")
    args = parser.parse_args(argv)
    from engine.checkpoint.inspection import inspect as run

    for line in run(args.path, args.tensors):
        print(line)


def convert_checkpoint(argv: list[str]) -> None:
    """Takes a checkpoint to plain DeepSpeed, or the weights out of one that DeepSpeed wrote."""
    parser = _parser("convert-checkpoint", convert_checkpoint, epilog=CONVERT_CHECKPOINT)
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


CONVERT_CHECKPOINT = """\
between our own backends nothing has to be converted: any run resumes any checkpoint, on any number of processes

--to universal   a checkpoint-N for a DeepSpeed program without this engine: weights and moments, ZeRO 1 to 3, any
                 number of processes; learning rate and weight decay are the program's, not the run's
--to model       the weights of a checkpoint that DeepSpeed wrote, universal or ZeRO's shards, as a model folder; no
                 more of it can be taken, for a run goes on only where its data plan does; files that hold more than
                 DeepSpeed's own records are refused, for reading them could run any code
"""


def doctor(argv: list[str]) -> int:
    """Checks machines and network before training; over all ranks by `bash launch/train.sh doctor ...`."""
    parser = _parser("doctor", doctor, settings=True, epilog=DOCTOR)
    add = parser.add_argument
    add("--patience", type=float, default=60, metavar="S", help="seconds to wait for ranks and network (default 60)")
    add("--json", type=Path, metavar="FILE", help="also write everything that was found there")
    args, rest = _with_settings(parser, argv)
    if args.patience <= 0:
        parser.error("--patience has to be above 0")
    from engine.doctor.examination import examine

    return examine(rest, args.patience, args.json)


DOCTOR = """\
settings are optional: with them (--config recipe.yaml ...) also what they name is checked: data, model, output folder

exit code 0: training may begin; 2: something would make it fail, and each failure is followed by what to do
"""


def report(argv: list[str]) -> None:
    """Writes a run's report: curves, speech, settings, checkpoints in one HTML file; of several runs, a comparison."""
    parser = _parser("report", report)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN_DIR", help="output folder of a run, also while it goes on"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: RUN_DIR/report.html; of several, comparison.html)"
    )
    args = parser.parse_args(argv)
    if len(args.runs) > 1:
        from engine.report.comparison import write_comparison

        print(f"comparison written to {write_comparison(args.runs, args.out or Path('comparison.html'))}")
        return
    from engine.report.page import write_report

    print(f"report written to {write_report(args.runs[0], args.out)}")


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
    "evaluate": evaluate,
    "generate": generate,
    "validate": validate,
    "plan": plan,
    "convert": convert,
    "consolidate": consolidate,
    "export": export,
    "merge": merge,
    "adapters": adapters,
    "verify": verify,
    "inspect": inspect,
    "convert-checkpoint": convert_checkpoint,
    "doctor": doctor,
    "report": report,
    "demo": demo,
}
