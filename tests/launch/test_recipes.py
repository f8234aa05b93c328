"""Recipes: each is read by the real code, plans to fit the GPUs it names, and its header says what the plan says."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from transformers import HiggsAudioV2Config

from engine.config import Settings, parse
from engine.launch.__main__ import main
from engine.launch.machine import Machine
from engine.plan import memory, report
from tests.commands import command, flags
from tests.launch.stub import FOREIGN
from tests.processes import ROOT

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
FOR_GPUS = [file for file in RECIPES if file.stem != "demo"]
PARTS = ("for whom", "data", "memory", "time", "plan", "launch", "look at")


def named(file: Path) -> str:
    return file.stem


def header(file: Path) -> dict[str, str]:
    """What the comment on top says: its first line as `title`, and what stands behind each word in front."""
    comment = [line[2:] for line in file.read_text().split("\n\n")[0].splitlines() if line.startswith("# ")]
    said = {"title": comment[0]}
    for line in comment[1:]:
        begun = re.match(rf"({'|'.join(PARTS)})  +(.*)", line)
        if begun:
            part, text = begun.groups()
            said[part] = text
        elif line.startswith("    "):
            said[part] += "\n" + line.strip()
        else:
            break
    return {part: text.replace("\\\n", "") for part, text in said.items()}


@pytest.fixture
def paths(released, tmp_path) -> dict:
    """In place of the names that a header's commands have: what is looked at before anything is loaded is there."""
    (tmp_path / "data.json").write_text("[]")
    codec = tmp_path / "codec"
    codec.mkdir()
    return {
        "model_path": released, "audio_tokenizer_path": codec, "train_data_file": tmp_path / "data.json",
        "output_dir": tmp_path / "out",
    }  # fmt: skip


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A folder with the configuration of the released checkpoint, 5.77 billion parameters, and no weights."""
    folder = tmp_path_factory.mktemp("released")
    HiggsAudioV2Config(codebook_size=1026).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """Recipes share rows of the same length: what these keep is counted once in this file."""
    counts, count = {}, memory.count

    def counted(config, settings, mode, row):
        key = config.num_hidden_layers, settings.use_lora and settings.lora_rank, settings.bf16, mode, row
        if key not in counts:
            counts[key] = count(config, settings, mode, row)
        return counts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "count", counted)
        yield


def settings_of(file: Path, paths: dict) -> Settings:
    return parse(["--config", str(file), *flags(**paths)])


def gpus(file: Path) -> tuple[int, int]:
    """How many GPUs the plan of a header is for, and their memory in GB."""
    words = shlex.split(header(file)["plan"])
    return int(words[words.index("--gpus") + 1]), int(words[words.index("--gpu_memory") + 1])


@pytest.mark.parametrize("file", FOR_GPUS, ids=named)
def test_a_header_says_all_that_is_asked(file):
    said = header(file)
    assert set(said) == {"title", *PARTS}
    assert "no GPU has confirmed" in file.read_text()
    for part in ("plan", "launch"):
        assert f"--config launch/recipes/{file.name} " in said[part], part
    number, size = gpus(file)
    of_name = re.search(r"(?:(\d+)x)?(\d+)gb", file.name)
    if of_name:
        assert (number, size) == (int(of_name[1] or 1), int(of_name[2]))
    assert f"{size} GB" in said["title"] and f"GiB of {size} at the peak" in said["memory"]


@pytest.mark.parametrize("file", RECIPES, ids=named)
def test_the_real_code_reads_it_and_its_backend_is_that_of_its_title(file, paths):
    settings = settings_of(file, paths)
    if file.stem == "demo":
        return
    title = header(file)["title"]
    assert ("LoRA" in title, "All parameters" in title) == (settings.use_lora, not settings.use_lora)
    stage = re.search(r"ZeRO (\d)", title)
    assert not stage or settings.backend == "deepspeed"
    assert "FSDP" not in title or settings.backend == "fsdp"
    if settings.backend == "deepspeed":
        zero = json.loads(Path(settings.ds_config).read_text())["zero_optimization"]
        assert Path(settings.ds_config).parent == ROOT / "ds_configs"
        assert not stage or zero["stage"] == int(stage[1])
        assert any(key.startswith("offload") for key in zero) == ("offload" in title)
    on = settings.with_resolved(gpus(file)[0], has_gpu=True)
    assert on.bf16 and on.micro_batches_per_step >= gpus(file)[0]
    assert on.save_steps % on.eval_steps == 0 or on.eval_steps % on.save_steps == 0, "so that `best` is a checkpoint"


@pytest.mark.parametrize("file", FOR_GPUS, ids=named)
def test_a_dry_run_of_its_own_command(file, paths, monkeypatch, capsys):
    """On a machine with the GPUs that the header names; a cluster is four of them, without SLURM."""
    for name in os.environ:
        if name.startswith((*FOREIGN, "CUDA_", "DS_")):
            monkeypatch.delenv(name)
    number = gpus(file)[0]
    nodes = 4 if "sbatch --nodes=4" in header(file)["launch"] else 1
    if nodes > 1:
        for name, value in {"LAUNCHER": "torchrun", "NNODES": "4", "NODE_RANK": "0", "MASTER_ADDR": "a"}.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(Machine, "here", lambda env: Machine("a", gpus=number // nodes, cores=64))
    monkeypatch.chdir(ROOT)
    words = shlex.split(header(file)["launch"].split("\n(")[0])
    given = words[words.index("--config") : words.index("--config") + 2]
    assert {word[2:] for word in words if word.startswith("--")} - {"nodes=4"} == {"config", *paths}
    assert main(["launch/train.sh", *given, *flags(**paths), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^#   processes: (\d+)", said, re.MULTILINE)[1] == str(number)
    assert not paths["output_dir"].exists()


@pytest.mark.parametrize("file", FOR_GPUS, ids=named)
def test_it_fits_and_its_numbers_are_the_plans(file, released, monkeypatch):
    for table in ("_by_mode", "_by_backend"):  # what was not chosen costs more to count than all the rest
        monkeypatch.setattr(report, table, lambda *_: ())
    monkeypatch.chdir(ROOT)
    said, words = header(file), shlex.split(header(file)["plan"])
    assert words[:2] == ["higgs-engine", "plan"]
    words[words.index("--model_path") + 1] = released
    plan = command(*words[1:])
    assert plan.code == 0, plan.out + plan.errors
    mode, peak = re.search(r"gradient_checkpointing auto: (\w+), ([\d.]+) GiB, fits", plan.out).groups()
    found = re.fullmatch(r"([\d.]+) GiB of \d+ at the peak, gradient_checkpointing (\w+)", said["memory"])
    assert (float(found[1]), found[2]) == (pytest.approx(float(peak), abs=0.15), mode)
    step = re.search(
        r"a step: ([\d,]+) tokens, ([\d,]+) s of audio, .*; ([\d.]+) s at 40% .*: ([\d,]+) tokens/s", plan.out
    )
    time = re.fullmatch(
        r"([\d.]+) s a step of ([\d,]+) tokens \(([\d,]+) s of audio\), ([\d,]+) tokens/s", said["time"]
    )
    numbers = {"of the plan": step.group(3, 1, 2, 4), "of the header": time.groups()}
    plan, told = ([float(number.replace(",", "")) for number in group] for group in numbers.values())
    assert told == pytest.approx(plan, rel=0.02), numbers
