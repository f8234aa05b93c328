"""What the README says exists: paths, settings, commands, tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import COMMANDS
from engine.config import FIELDS
from tests.processes import ROOT

README = (ROOT / "README.md").read_text()
OTHER_FLAGS = {"help", "setting", "config", "recordings", "out", "local-dir", "nproc_per_node", "nnodes"}
OTHER_FLAGS |= {"report", "show", "to", "no-freeze_audio_tower", "tensors", "path", "format", "compare_models"}
OTHER_FLAGS |= {"gpus", "gpu_memory", "nodes", "dry_run", "text"}
MERGE_FLAGS = {"base_model_path", "lora_adapter_path", "output_path"}


def test_paths_exist():
    named = set(re.findall(r"`((?:engine|launch|tests|benchmarks|ds_configs)/[\w./-]+)`", README))
    named |= set(re.findall(r"\]\(([\w/.-]+)\)", README))
    assert len(named) > 12
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_annotated_tree_names_every_module():
    tree = README[README.index("## Where things are") :]
    modules = [p for p in (ROOT / "engine").rglob("*.py") if p.name not in ("__init__.py", "__main__.py")]
    hidden = {"demo_model.py", "demo_speech.py"}  # parts of demo.py
    missing = [p.name for p in modules if p.name not in tree and p.name not in hidden]
    assert missing == []


def test_flags_are_settings():
    flags = set(re.findall(r"--([a-z][\w-]+)", README)) - OTHER_FLAGS - MERGE_FLAGS
    assert flags and flags <= set(FIELDS), flags - set(FIELDS)
    table = README[README.index("## Settings that matter") : README.index("## What a run leaves")]
    first_cells = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    names = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert len(names) > 15 and names <= set(FIELDS), names - set(FIELDS)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"higgs-engine\s+([a-z-]+)", README))))
def test_commands_exist(command):
    assert command in COMMANDS


def test_the_download_command_comes_with_the_engine():
    (command,) = set(re.findall(r"^ *(\S+ download) \S+ --local-dir", README, re.MULTILINE))
    name, what = command.split()
    told = subprocess.run([Path(sys.executable).with_name(name), what, "--help"], capture_output=True, text=True)
    assert "--local-dir" in told.stdout, told.stderr


def test_defaults_in_the_table_are_the_defaults():
    for name, shown in re.findall(r"^\| `(\w+)` \| `?([\w]+)`? \|", README, re.MULTILINE):
        default = FIELDS[name].default
        if shown in ("true", "false") or shown.isdigit():
            wanted = 8192 if name == "max_tokens_per_micro_batch" else default
            assert str(wanted).lower() == shown, name


LAUNCHING = (ROOT / "launch" / "README.md").read_text()


def test_launching_names_files_and_flags_that_exist():
    named = set(re.findall(r"\]\(([\w.-]+)\)", LAUNCHING)) | {"train.sh"}
    named |= set(re.findall(r"(?<=launch/)[\w.-]+\.\w+", LAUNCHING)) - {"launch.py"}
    assert [name for name in sorted(named) if not (ROOT / "launch" / name).exists()] == []
    ours = set(re.findall(r"`--([a-z_]+)[ `]", LAUNCHING)) - {"all", "cut", "dry_run", "requeue"}
    assert {"max_restarts", "resume"} <= ours <= set(FIELDS), ours - set(FIELDS)


def test_the_table_of_exit_codes_is_the_engines():
    from engine import exit_codes

    table = {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", LAUNCHING, re.MULTILINE)}
    assert table == {name: code for name, code in vars(exit_codes).items() if isinstance(code, int)}


def test_the_table_of_forwarded_variables_is_the_engines():
    from engine.launch.environment import FORWARDED

    section = LAUNCHING[LAUNCHING.index("## Environment variables") : LAUNCHING.index("## Try it")]
    assert dict(re.findall(r"^\| `([\w*]+)` \| (.*) \|$", section, re.MULTILINE)) == FORWARDED
