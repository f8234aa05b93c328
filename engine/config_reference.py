"""Two pages of the documentation that are made from the code they tell of, so that they cannot differ from it:

    python -m engine.config_reference > docs/settings.md
    python -m engine.config_reference metrics > docs/metrics.md

A setting is described once, where it is declared (engine/config.py); a metric likewise (engine/observe/schema.py).
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_origin

from engine.config import FIELDS, GROUPS, SCHEMA
from engine.observe import schema

KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
MADE = "<!-- made by `python -m engine.config_reference{}`: change the code, not this page -->"

SETTINGS = """\
# Every setting

A setting is a key of the YAML file that `--config` names and a flag of the command line (`--learning_rate 1e-4`); the
flag is stronger. There are no sections. A list takes values with spaces or commas between them; a true/false setting
alone means true, and `--no-NAME` false; `none` clears a setting that may be empty. An unknown name, a wrong type or a
contradiction is an error before anything is loaded, all of them in one message. `higgs-engine train --help` says the
same as this page, and the resolved settings of a run are in its `config.yaml`, which alone repeats the run.
"""

METRICS = """\
# Every metric

What a logged step says, under the same names in the console, in `metrics.jsonl`, in the trackers (TensorBoard, W&B,
MLflow, trackio: there as `group/name`, a value of a list as `group/name/0`, ...) and in the report. Evaluations write
those of the groups `loss` and `accuracy` with `eval_` before them. A list has one value a codebook, the first codebook
first. What is not known (no targets of that kind in the step, no GPU) is null.
"""


SCORES_ABOUT = """\
Of generated speech: under `scores` in each line of `samples/samples.jsonl`, with `transcript`, what was recognised.
Words need `asr_model_path`, the voice `speaker_model_path`; without them these are null.
"""


def settings_page() -> Iterator[str]:
    """Lines of docs/settings.md."""
    yield from (MADE.format(""), "", SETTINGS)
    yield from (f"- [{group}](#{_anchor(group)}): {text}" for group, text in GROUPS.items())
    for group, text in GROUPS.items():
        yield from ("", f"## {group}", "", f"{text[0].upper()}{text[1:]}.", "")
        yield from ("| setting | default | what it is |", "|---|---|---|")
        for name, field in FIELDS.items():
            if field.metadata["group"] == group:
                yield f"| `{name}` | {_default(field.metadata)} | {_cell(_meaning(name, field.metadata))} |"


def metrics_page() -> Iterator[str]:
    """Lines of docs/metrics.md."""
    from engine.evaluate.scores import SCORES

    yield from (MADE.format(" metrics"), "", METRICS)
    for group, text in schema.GROUPS.items():
        yield from (f"## {group}", "", f"{text[0].upper()}{text[1:]}.", "")
        yield from _table(metric for metric in schema.METRICS if metric.group == group)
    yield from ("## scores of samples", "", SCORES_ABOUT)
    yield from _table(SCORES)


def _table(metrics: Iterable[schema.Metric]) -> Iterator[str]:
    better = {True: "higher", False: "lower", None: ""}
    yield from ("| metric | unit | better | meaning |", "|---|---|---|---|")
    for metric in metrics:
        cells = (f"`{metric.name}`", metric.unit, better[metric.higher_is_better], _cell(metric.meaning))
        yield f"| {' | '.join(cells)} |"
    yield ""


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _default(about: dict[str, Any]) -> str:
    value = about["default"]
    if about["required"]:
        return "required"
    if value is None or value == []:
        return "none"
    words = value if isinstance(value, list) else [value]
    return "`" + " ".join(str(word).lower() if isinstance(word, bool) else str(word) for word in words) + "`"


def _meaning(name: str, about: dict[str, Any]) -> str:
    """What it does, then what may be written there: choices, else kind of value and limits."""
    if about["choices"]:
        allowed = ("one or more of " if _is_list(name) else "one of ") + ", ".join(about["choices"])
    elif about["path"]:
        allowed = {"FILE": "a file", "FOLDER": "a folder", "DATA": "files or folders"}[about["path"]]
    else:
        kind = SCHEMA.kinds[name]
        allowed = KINDS[get_args(kind)[0]] + "s" if _is_list(name) else KINDS[kind]
        allowed = allowed.replace("texts", "words")
    return f"{about['help']}. *{', '.join(filter(None, (allowed, about['rule'])))}*"


def _is_list(name: str) -> bool:
    return get_origin(SCHEMA.kinds[name]) is list


def _cell(text: str) -> str:
    """As Markdown that shows these words: no column ends and nothing is set in another type by them."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("'*audio_mlp*'", "`*audio_mlp*`")


PAGES = {"settings": settings_page, "metrics": metrics_page}


def page(name: str) -> str:
    return "\n".join(PAGES[name]()).rstrip("\n") + "\n"


if __name__ == "__main__":
    print(page(sys.argv[1] if len(sys.argv) > 1 else "settings"), end="")
