"""The documentation: its commands are run, its links and numbers are right, its generated pages are those of the code.

A block of commands that cannot be run here says why in a comment (`NEEDS`); all others are run in order, page by page,
by the engine in this process, on the demo's model under the names that the pages use and with few steps (`FEWER`).
Those of several machines (launch/README.md) are run by tests/launch/test_two_nodes.py.
"""

import inspect
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import config_reference
from engine.callbacks import Callback
from engine.cli import COMMANDS
from engine.cli_help import BELOW
from engine.config import FIELDS, parse
from tests.commands import command, done
from tests.launch.test_recipes import FOR_GPUS, PARTS, RECIPES, header
from tests.processes import ROOT

PAGES = {file.relative_to(ROOT).as_posix(): file.read_text() for file in (ROOT / "docs").glob("*.md")}
PAGES["README.md"] = (ROOT / "README.md").read_text()
NEEDS = ("# needs a GPU", "# needs the network", "# needs several machines")
ELSEWHERE = {
    "bash launch/train.sh": "tests/launch/test_demo.py",
    "bash launch/train.sh demo --recordings my_voices/": "tests/launch/test_demo.py",  # there on other recordings
    "bash launch/train.sh doctor": "tests/doctor/test_doctor.py",
    "bash tests/run.sh": "tests/run.sh",
    "export PATH=$PWD/.venv/bin:$PATH": "launch/setup_env.sh",
}
"""Commands that are not run here, and where they are."""

FEWER = (
    "--max_steps 2 --save_steps 2 --eval_steps 2 --sample_every 2 --sample_count 1 --sample_seconds 0.4 "
    "--warmup_steps 1 --logging_steps 1 --validation_split 0.3 --backend none --report_to none "
    "--max_tokens_per_micro_batch 1024 --micro_batches_per_step 1 --dataloader_num_workers 0"
)
RUN_HERE = ("docs/first-fine-tune.md", "docs/data.md", "docs/watching.md", "docs/troubleshooting.md", "README.md")


def blocks(page: str) -> Iterator[str]:
    for _, text in re.findall(r"^( *)```bash\n(.*?)^\1```", PAGES[page], re.MULTILINE | re.DOTALL):
        yield text


def commands(block: str) -> list[str]:
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [
        " ".join(shlex.split(line, comments=True, posix=False)) for line in lines if shlex.split(line, comments=True)
    ]


def runnable(page: str) -> list[str]:
    return [line for block in blocks(page) if not any(need in block for need in NEEDS) for line in commands(block)]


def test_every_command_is_run_or_says_what_it_needs():
    found = {page: runnable(page) for page in PAGES}
    assert sum(map(len, found.values())) > 20
    for page, lines in found.items():
        for line in lines:
            if line in ELSEWHERE:
                assert (ROOT / ELSEWHERE[line]).exists(), line
            else:
                assert re.match(r"higgs-engine |bash launch/train.sh --config launch/recipes/[\w-]+.yaml ", line), line
                assert page in (*RUN_HERE, "docs/callbacks.md"), f"{page}: {line} is run by no test"


# ---------------------------------------------------------------- running them


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Where recordings are encoded once for all pages."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def desk(demo, cache, tmp_path, monkeypatch) -> Path:
    """A folder with everything under the names of the pages, as the working directory."""
    for name, target in {
        "higgs": demo.model_path, "higgs-codec": demo.audio_tokenizer_path, "launch": ROOT / "launch",
        "output/demo": demo.model_path.parent, "audio": demo.data_file.parent / "audio",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    shutil.copy(demo.data_file, tmp_path / "data.json")
    (tmp_path / "my_voices").mkdir()
    for row in json.loads(demo.data_file.read_text())[:7]:
        *_, said, target = (part for message in row["messages"] for part in _parts(message))
        wav = demo.data_file.parent / target["audio_url"]
        shutil.copy(wav, tmp_path / "my_voices" / wav.name)
        (tmp_path / "my_voices" / f"{wav.stem}.txt").write_text(said["text"].rpartition(":")[2].strip())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return tmp_path


def _parts(message: dict) -> list:
    content = message["content"]
    return content if isinstance(content, list) else [content] if isinstance(content, dict) else []


def run(line: str) -> str:
    """One command of a page; its last checkpoint is that of the second step."""
    words = shlex.split(re.sub(r"checkpoint-\d+", "checkpoint-2", line))
    if words[:2] == ["bash", "launch/train.sh"]:
        return done("train", *words[2:], *FEWER.split())
    return done(*words[1:])


def test_the_first_fine_tune_and_what_follows_it(desk):
    """One run serves the pages that look at a run: they all call it `out`."""
    for page in RUN_HERE[:-1]:
        for line in runnable(page):
            if line not in ELSEWHERE:
                run(line)
    assert (desk / "out/model/model.safetensors").exists() and (desk / "hello.wav").stat().st_size > 1000
    assert "<audio" in (desk / "out/report.html").read_text()
    assert (desk / "my_voices-report/report.html").exists() and (desk / "store/header.json").exists()


def test_the_readmes_way_from_recordings_to_a_merged_model(desk):
    for line in runnable("README.md"):
        if line not in ELSEWHERE:
            run(line)
    assert (desk / "out/merged/model.safetensors").exists() and (desk / "hello.wav").exists()


def test_the_hook_of_the_page_is_called_and_stops_the_run(desk):
    """With a limit that so short a run reaches."""
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGES["docs/callbacks.md"], re.MULTILINE | re.DOTALL)
    source = (ROOT / "engine/callbacks.py").read_text()
    assert "\n".join(f"    {line}".rstrip() for line in example.splitlines()) in source, "the page and the docstring"
    (desk / "my_hooks.py").write_text(example.replace("< 2:", "< 100:"))
    (line,) = runnable("docs/callbacks.md")
    said = run(line + " --sample_every none")
    assert "ding" in said and "the loss is below 2" in said
    assert (desk / "out-bell/checkpoint-1").is_dir() and not (desk / "out-bell/checkpoint-2").exists()


def test_every_hook_stands_in_the_table():
    told = re.findall(r"^\| `(\w+)\((.*?)\)`", PAGES["docs/callbacks.md"], re.MULTILINE)
    hooks = {name: inspect.getfullargspec(hook).args[1:] for name, hook in vars(Callback).items() if name[0] != "_"}
    assert {name: words.split(", ") if words else [] for name, words in told} == hooks


# ---------------------------------------------------------------- what it says


@pytest.mark.parametrize("name", config_reference.PAGES)
def test_generated_pages_are_up_to_date(name):
    again = f"python -m engine.config_reference {name} > docs/{name}.md"
    assert PAGES[f"docs/{name}.md"] == config_reference.page(name), f"out of date → {again}"


def test_a_setting_and_a_metric_stand_there_with_all_that_is_known_of_them():
    page = config_reference.page("settings")
    assert "| `max_grad_norm` | `1.0` | norm to which gradients are clipped; 0: never. *number, at least 0* |" in page
    assert "| `resume` | `none` |" in page and "| `model_path` | required |" in page
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(FIELDS)
    assert "| `eos_loss` | nats | lower |" in config_reference.page("metrics")
    assert "| `speaker_similarity` |  | higher |" in config_reference.page("metrics")


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", PAGES[page]):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, f"{target}#{anchor}"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_files_that_it_names_exist(page):
    named = re.findall(r"`((?:engine|launch|tests|benchmarks|ds_configs|docs)/[\w./-]+)`", PAGES[page])
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES["README.md"]))
    assert linked == set(PAGES) - {"README.md"}
    for recipe in (ROOT / "launch/recipes").glob("*.yaml"):
        assert f"launch/recipes/{recipe.name}" in PAGES["README.md"], recipe.name


HELP: dict[str, str] = {}


@pytest.mark.parametrize("page", sorted(PAGES) + ["--help"])
def test_flags_of_commands_exist(page):
    """Also of commands within a sentence, and in the examples of --help."""
    joined = re.sub(r"\\\n\s*", "", PAGES.get(page) or "".join(BELOW.values()))
    for name, rest in re.findall(r"higgs-engine\s+([a-z-]+)([^`\n]*)", joined):
        assert name in COMMANDS, name
        if name not in HELP:
            HELP[name] = command(name, "--help").out
            assert BELOW[name].rstrip() in HELP[name]
            HELP[name] = HELP[name].replace(BELOW[name].rstrip(), "")  # examples prove nothing
        for flag in re.findall(r"(--\w+)", rest.partition("#")[0]):
            assert re.search(rf"{flag}\b", HELP[name]), f"{name} {flag}"


def test_help_says_what_a_command_does_without():
    """Though the settings below it are marked as required, as training requires them."""
    assert "does without model_path, audio_tokenizer_path, which" in command("validate", "--help").out
    assert "does without" not in command("prepare", "--help").out


def test_every_recipe_says_what_the_readme_promises():
    for file in RECIPES:
        assert set(PARTS) - header(file).keys() <= ({"plan"} if file.stem == "demo" else set()), file.stem


def test_numbers_of_recipes_are_those_of_their_headers():
    """And so of the plan, which tests/launch/test_recipes.py compares them with."""
    page = PAGES["docs/lora-or-full.md"]
    rows = dict(re.findall(r"^\| \[([\w-]+)\.yaml\]\(\S+\) \| (\d+ of .*) \|$", page, re.MULTILINE))
    assert set(rows) == {file.stem for file in FOR_GPUS}
    for file in FOR_GPUS:
        said = header(file)
        memory, mode = re.match(r"([\d.]+) GiB .* gradient_checkpointing (\w+)", said["memory"]).groups()
        seconds, audio = re.match(r"([\d.]+) s a step .*\(([\d,]+) s of audio\)", said["time"]).groups()
        assert f"| {memory} | {mode} | {seconds} ({audio} s of audio;" in rows[file.stem], file.stem


# ---------------------------------------------------------------- from the seed

SEED_FLAGS = """
model_path audio_tokenizer_path train_data_file eval_data_file validation_split output_dir num_train_epochs
per_device_train_batch_size per_device_eval_batch_size learning_rate warmup_steps logging_steps save_steps eval_steps
disable_evaluation use_lora lora_rank lora_alpha lora_dropout seed bf16 report_to logging_dir freeze_audio_tower
freeze_audio_encoder_proj freeze_llm
""".split()
TOOL_FLAGS = {
    "merge": [
        "base_model_path",
        "lora_adapter_path",
        "output_path",
        "compare_models",
        "test_input",
        "no_save_tokenizer",
    ],
    "adapters": ["path", "verbose"],
}


def section(heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGES["docs/from-the-seed.md"], re.MULTILINE | re.DOTALL)[1]


def test_every_flag_of_the_seed_is_a_setting():
    told = re.findall(r"^\| `--(\w+)` \|", section("Flags of training"), re.MULTILINE)
    assert told == SEED_FLAGS and set(told) <= set(FIELDS)


def test_the_seeds_command_line_is_taken(desk):
    """All of its flags at once, with its own values."""
    line = """
        --model_path higgs --audio_tokenizer_path higgs-codec --train_data_file data.json --validation_split 0.005
        --output_dir ./output --num_train_epochs 3 --per_device_train_batch_size 4 --per_device_eval_batch_size 1
        --learning_rate 5e-5 --warmup_steps 100 --logging_steps 10 --save_steps 7000 --eval_steps 5000 --use_lora
        --lora_rank 16 --lora_alpha 32 --lora_dropout 0.1 --seed 42 --bf16 --report_to tensorboard --logging_dir ./logs
        --disable_evaluation --freeze_audio_tower --freeze_audio_encoder_proj --eval_data_file data.json
    """
    settings = parse(line.split())
    assert settings.save_steps == 7000 and settings.bf16 and settings.logging_dir == os.path.abspath("logs")
    assert parse([*line.split()[:6], "--freeze_llm"]).freeze_llm
    assert parse([*line.split()[:6], "--report_to", "none"]).report_to == []


def test_every_flag_of_its_tools_is_taken():
    told: dict[str, list[str]] = {}
    for name, flag in re.findall(r"^\| `(\w+)` \| `--(\w+)` \|", section("Flags of the tools"), re.MULTILINE):
        told.setdefault(name, []).append(flag)
    assert told == TOOL_FLAGS
    for name, names in told.items():
        assert all(f"--{flag}" in command(name, "--help").out for flag in names)


def test_flags_of_forks_are_no_settings_and_what_replaces_them_is():
    rows = re.findall(r"^\| `--(\w+)` \| (.*) \|$", section("Flags of its forks"), re.MULTILINE)
    assert len(rows) > 15
    for flag, instead in rows:
        assert flag not in FIELDS, flag
        names = re.findall(r"`(\w+)`", instead)
        assert (names or instead.startswith("nothing")) and set(names) <= set(FIELDS), flag
