"""The command line: `higgs-engine COMMAND`, the same as `python -m engine COMMAND`. One short function a command.

Mistakes that a user can mend are printed without a traceback; exit codes are those of engine/exit_codes.py.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.cli_help import BELOW
from engine.cli_options import parser_of, with_settings
from engine.cli_weights import adapters, consolidate, convert_checkpoint, export, inspect, merge, verify
from engine.errors import EngineError
from engine.exit_codes import DONE, FAILED, MISTAKE
from engine.runtime import activity

ON_ALL_RANKS = ("train", "prepare", "evaluate", "doctor")


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
    except Exception as error:
        if launched:
            traceback.print_exc()  # what Python would do; but its teardown may wait for peers that are gone
        elif isinstance(error, BrokenPipeError):  # `... | head` has read enough; what is left would fail at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        elif isinstance(error, OSError) and error.filename and name not in ON_ALL_RANKS:
            remedy = "look whether it, or its folder, is there and may be read and written"
            print(f"\nhiggs-engine {name}: {error.filename}: {error.strerror} → {remedy}", file=sys.stderr)
            code = MISTAKE
        else:
            raise
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
        print(f"What is no setting:\n{dry_run.HELP}\n\nfor example:\n{BELOW['train']}")
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

    parser = parser_of("evaluate", evaluate, settings=True)
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a checkpoint of a run, and its settings")
    parser.add_argument("--out", type=Path, default=Path("evaluation.json"), help="file to write (evaluation.json)")
    without = ("train_data_file", "audio_tokenizer_path")
    args, rest = with_settings(parser, argv, without)
    if args.out.is_dir():
        parser.error(f"--out {args.out}: is a folder; give the name of a file, such as {args.out / 'evaluation.json'}")
    if args.checkpoint is not None and "--config" not in {word.partition("=")[0] for word in rest}:
        rest = ["--config", str(args.checkpoint / "config.yaml"), *rest]
    settings = parse(rest, "higgs-engine evaluate", optional=without)
    from engine.evaluation import evaluate as run

    return run(settings, args.checkpoint and args.checkpoint.absolute(), args.out.absolute())


def generate(argv: list[str]) -> int:
    """Speaks: a text to a wav, or all rows of a data file to a folder, with scores."""
    from engine.data.formats import FORMATS
    from engine.data.layouts import LAYOUTS

    parser = parser_of("generate", generate)
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


def prepare(argv: list[str]) -> int:
    """Turns data of any format into a prepared store; on all GPUs by `bash launch/train.sh prepare ...`."""
    from engine.config import parse

    parser = parser_of("prepare", prepare, settings=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the store; several data files: one in each")
    args, rest = with_settings(parser, argv)
    settings = parse(rest, "higgs-engine prepare")
    from engine.prepare import prepare_stores

    prepare_stores(settings, args.out.absolute())
    return 0


def validate(argv: list[str]) -> int:
    """Checks every row of a data set and writes a report; `--show ROW` shows one sample in full."""
    from engine.config import parse

    parser = parser_of("validate", validate, settings=True)
    parser.add_argument("--report", type=Path, default=Path("data-report"), help="folder of the report (data-report)")
    shown = "print turns, tokens, delay grid and labels of a row, for which it needs model and codec"
    parser.add_argument("--show", type=int, metavar="ROW", help=shown)
    without = ("model_path", "audio_tokenizer_path")
    args, rest = with_settings(parser, argv, without)
    settings = parse(rest, "higgs-engine validate", optional=without if args.show is None else ())
    from engine.prepare import show_row, validate_all

    if args.show is not None:
        print(show_row(settings, args.show))
        return 0
    return 0 if validate_all(settings, args.report.absolute()) else MISTAKE


def plan(argv: list[str]) -> int:
    """Says before a run, without a GPU: memory, what fits, tokens, FLOPs and time of a step and of an epoch."""
    from engine.config import parse

    parser = parser_of("plan", plan, settings=True)
    add = parser.add_argument
    add("--gpus", type=int, default=1, metavar="N", help="how many GPUs (default 1)")
    add("--gpu_memory", type=float, default=80, metavar="GIB", help="memory of each (default 80)")
    add("--peak_tflops", type=float, default=989, help="their dense bf16 peak (default 989: H100, H200)")
    add("--efficiency", type=float, default=0.4, help="share of it that training reaches, the MFU (default 0.4)")
    without = ("audio_tokenizer_path", "train_data_file")
    args, rest = with_settings(parser, argv, without)
    if min(args.gpus, args.gpu_memory, args.peak_tflops, args.efficiency) <= 0:
        parser.error("--gpus, --gpu_memory, --peak_tflops and --efficiency have to be above 0")
    settings = parse(rest, "higgs-engine plan", optional=without)
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
    parser = parser_of("convert", convert, more=f"formats:\n{listing}")
    parser.add_argument("source", type=Path, help="data file or folder")
    parser.add_argument("target", type=Path, help="new data file or folder")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format to write")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="format of the source")
    args = parser.parse_args(argv)
    rows = run(args.source, args.target, args.to, args.format)
    print(f"{rows:,} rows written to {args.target}")


def doctor(argv: list[str]) -> int:
    """Checks machines and network before training; over all ranks by `bash launch/train.sh doctor ...`."""
    parser = parser_of("doctor", doctor, settings=True)
    add = parser.add_argument
    add("--patience", type=float, default=60, metavar="S", help="seconds to wait for ranks and network (default 60)")
    add("--json", type=Path, metavar="FILE", help="also write everything that was found there")
    args, rest = with_settings(parser, argv, ("model_path", "audio_tokenizer_path", "train_data_file"))
    if not 0 < args.patience < float("inf"):
        parser.error("--patience has to be a number of seconds above 0")
    from engine.doctor.examination import examine

    return examine(rest, args.patience, args.json)


def report(argv: list[str]) -> None:
    """Writes a run's report: curves, speech, settings, checkpoints in one HTML file; of several runs, a comparison."""
    parser = parser_of("report", report)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN_DIR", help="output folder of a run, also while it goes on"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: RUN_DIR/report.html; of several, comparison.html)"
    )
    args = parser.parse_args(argv)
    from engine.report.comparison import write_comparison
    from engine.report.page import write_report

    if len(args.runs) > 1:
        print(f"comparison written to {write_comparison(args.runs, args.out or Path('comparison.html'))}")
    else:
        print(f"report written to {write_report(args.runs[0], args.out)}")


def demo(argv: list[str]) -> None:
    """Trains a small random Higgs on speech-like data that it makes itself, end to end, in a few minutes."""
    parser = parser_of("demo", demo)
    parser.add_argument("--folder", type=Path, default=Path("output/demo"), help="where everything goes (output/demo)")
    parser.add_argument("--recordings", type=Path, help="folder of name.wav + name.txt to train on instead")
    args, settings = parser.parse_known_args(argv)
    from engine.demo import run

    run(args.folder, args.recordings, settings)


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
