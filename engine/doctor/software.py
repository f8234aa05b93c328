"""Whether all ranks run the same thing: libraries, the engine's code, settings, data, model, NCCL's environment.

Whatever of this differs shows up as a hang, or as numbers that nobody can repeat. Content is told apart without reading
it in full: a prepared store by its own fingerprint, a file by its size and stretches of it, a folder by its files.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch

import engine
from engine.config import FIELDS, Settings
from engine.data.store import HEADER, is_store
from engine.doctor.findings import FAILURE, OK, WARNING, Facts, Finding, deviants
from engine.runtime.distributed import World
from engine.untrusted import read_object

LIBRARIES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "torchaudio",
    "safetensors",
    "numpy",
    "flash-attn",
    "torchao",
)
HARMLESS = ("python", "numpy", "safetensors", "driver")
"""Where these differ a run goes on all the same, mostly."""
DRIVER = Path("/sys/module/nvidia/version")
ENVIRONMENT = ("NCCL_", "GLOO_", "TORCH_NCCL_", "FI_", "UCX_")
OF_A_MACHINE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
"""Names of interfaces: one machine's may not be another's."""
OWN_PATHS = ("ds_config", "codes_cache_dir")
"""Settings whose paths lie in the installation or in the home folder, which need not be the same everywhere."""
STRETCH = 1 << 16
ENTRIES = 64
"""Files of a folder that are looked into; a folder of recordings may have a million."""
OF_A_MODEL = (".safetensors", ".json", ".model", ".jinja")
"""What counts in the folder of a model; beside it downloads leave notes and pictures."""


def probe(world: World, settings: Settings | None, problems: Sequence[str] = ()) -> dict:
    """`problems`: what this rank found wrong with the settings. One rank of each machine looks at files."""
    looks = world.local_rank == 0
    paths = _paths(settings) if looks and settings is not None else []
    return {
        "versions": versions(world.device.type == "cuda"),
        "environment": {n: v for n, v in sorted(os.environ.items()) if n.startswith(ENVIRONMENT)},
        "settings": None if settings is None else _given(settings),
        "problems": list(problems),
        "code": code_hash(Path(engine.__file__).parent) if looks else None,
        "content": {name: content(Path(path)) for name, path in paths} if looks else None,
    }


def versions(on_gpu: bool) -> dict[str, str]:
    found = {"higgs-engine": engine.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if on_gpu:
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        with contextlib.suppress(OSError):
            found["driver"] = DRIVER.read_text().strip()
    return found


@lru_cache
def code_hash(package: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _given(settings: Settings) -> dict:
    """The settings that are not the defaults: what a machine's own recipe may say differently."""
    defaults = {name: field.metadata["default"] for name, field in FIELDS.items()}
    given = {name: value for name, value in dataclasses.asdict(settings).items() if value != defaults[name]}
    return {name: value for name, value in given.items() if name not in OWN_PATHS}


def _paths(settings: Settings) -> Iterable[tuple[str, str]]:
    """What is to be looked at, with a name for it, the same on all machines."""
    for name in ("model_path", "audio_tokenizer_path", "lora_adapter_path"):
        if path := getattr(settings, name):
            yield f"{name}: {path}", path
    for name in ("train_data_file", "eval_data_file"):
        yield from ((f"{name}: {path}", path) for path in getattr(settings, name))
    if settings.backend == "deepspeed":
        yield Path(settings.ds_config).name, settings.ds_config


def content(path: Path) -> str | None:
    """Short mark of what is there, without times, which copies do not keep; None: it cannot be read."""
    try:
        if is_store(path) and (fingerprint := _fingerprint(path)):
            return f"store {fingerprint[:12]}"
        digest = hashlib.sha256()
        if path.is_file():
            _look_into(path, digest)
        else:
            names = sorted(name for name in os.listdir(path) if not name.startswith("."))
            if "config.json" in names:
                names = [name for name in names if name.endswith(OF_A_MODEL)]
            digest.update("\n".join(names).encode())
            for name in names[:ENTRIES]:
                if (path / name).is_file():
                    _look_into(path / name, digest)
        return digest.hexdigest()[:12]
    except OSError:
        return None


def _fingerprint(store: Path) -> str | None:
    """None: its header is damaged, which whoever opens the store says better."""
    try:
        return str(read_object(store / HEADER)["fingerprint"])
    except (ValueError, KeyError):
        return None


def _look_into(file: Path, digest) -> None:
    with open(file, "rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        for start in sorted({0, max(0, size // 2), max(0, size - STRETCH)}):
            opened.seek(start)
            digest.update(opened.read(STRETCH))


# ---------------------------------------------------------------- judged, over all ranks


def judge(everyone: Sequence[Facts]) -> Iterator[Finding]:
    yield from _versions(everyone)
    looked = [facts for facts in everyone if facts["software"]["code"]]
    usual, others = deviants(everyone, lambda facts: facts["software"]["code"], looked)
    differs = [
        Finding(
            "software", FAILURE, f"code: the engine is {usual}, but {other} on {whose}",
            "install or check out the same code everywhere",
        )
        for other, whose in others
    ]  # fmt: skip
    yield from differs or [Finding("software", OK, f"code: the engine is {usual} everywhere")]
    yield from _problems(everyone)
    yield from _settings(everyone)
    yield from _content(looked, everyone)
    yield from _environment(everyone)


def _versions(everyone: Sequence[Facts]) -> Iterator[Finding]:
    names = list(dict.fromkeys(name for facts in everyone for name in facts["software"]["versions"]))
    agreed = []
    for name in names:
        usual, others = deviants(everyone, lambda facts, name=name: facts["software"]["versions"].get(name))
        wrong = [
            Finding(
                "software", WARNING if name in HARMLESS else FAILURE,
                f"versions: {name} is {usual or 'absent'}, but {other or 'absent'} on {whose}",
                "install the same versions on all machines",
            )
            for other, whose in others
        ]  # fmt: skip
        yield from wrong
        agreed += [] if wrong else [f"{name} {usual}"]
    yield Finding("software", OK, f"versions: {', '.join(agreed)}")


def _problems(everyone: Sequence[Facts]) -> Iterator[Finding]:
    """What ranks found wrong with their settings, each mistake once."""
    lines = list(dict.fromkeys(line for facts in everyone for line in facts["software"]["problems"]))
    for line in lines:
        _, having = deviants(everyone, lambda facts, line=line: line not in facts["software"]["problems"])
        whose = next((whose for found, whose in having if not found), "")
        text, _, remedy = line.partition(" → ")
        yield Finding("software", FAILURE, f"settings: {text}" + (f" ({whose})" if whose else ""), remedy)


def _settings(everyone: Sequence[Facts]) -> Iterator[Finding]:
    known = [facts for facts in everyone if facts["software"]["settings"] is not None]
    names = sorted({name for facts in known for name in facts["software"]["settings"]})
    agree = True
    for name in names:
        default = FIELDS[name].metadata["default"] if name in FIELDS else None
        usual, others = deviants(everyone, lambda f, n=name, d=default: f["software"]["settings"].get(n, d), known)
        for other, whose in others:
            agree = False
            yield Finding(
                "software", FAILURE, f"settings: {name} is {usual!r}, but {other!r} on {whose}",
                "start all machines with the same settings, in the same folder",
            )  # fmt: skip
    if known and agree:
        yield Finding("software", OK, f"settings: {len(names)} other than the defaults, equal everywhere")


def _content(looked: Sequence[Facts], everyone: Sequence[Facts]) -> Iterator[Finding]:
    """What the settings name is the same on all machines that have it under that name."""
    knowing = [facts for facts in looked if facts["software"]["content"]]
    names = list(dict.fromkeys(name for facts in knowing for name in facts["software"]["content"]))
    for name in names:
        having = [facts for facts in knowing if name in facts["software"]["content"]]
        usual, others = deviants(everyone, lambda facts, name=name: facts["software"]["content"][name], having)
        wrong = list(others)
        for other, whose in wrong:
            what = f"is other content ({other})" if other and usual else "cannot be read" if usual else "can be read"
            yield Finding(
                "software", FAILURE, f"{name} ({usual or 'not readable'}) {what} on {whose}",
                "copy it anew, or put it where all machines see it",
            )  # fmt: skip
        if not wrong:
            level, remedy = (OK, "") if usual else (FAILURE, "may the user of the processes read it?")
            yield Finding("software", level, f"{name} ({usual or 'cannot be read'})", remedy)


def _environment(everyone: Sequence[Facts]) -> Iterator[Finding]:
    names = sorted({name for facts in everyone for name in facts["software"]["environment"]} - set(OF_A_MACHINE))
    for name in names:
        usual, others = deviants(everyone, lambda facts, name=name: facts["software"]["environment"].get(name))
        for other, whose in others:
            text = f"environment: {name} is {usual or 'not set'}, but {other or 'not set'} on {whose}"
            yield Finding("software", WARNING, text, "set it alike for all ranks; the launcher has to forward it")
