"""Which environment variables the processes on other machines get, and how they travel there.

srun hands the whole environment on, and where every machine is started by hand each has its own. By ssh none would
arrive but those of the list below: they stand in a private file that DeepSpeed's launcher reads (DS_ENV_FILE), which
makes shell commands of it. Whatever it makes a command of is seen in the list of processes of every machine, so names
that look like secrets are left out.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from engine.errors import ConfigError

FORWARDED = {
    "NCCL_*": "interfaces, protocols and messages of NCCL: all processes have to choose alike",
    "GLOO_*": "the interface of gloo, likewise",
    "UCX_*": "transports of the network's own library: UCX",
    "FI_*": "likewise libfabric, for EFA and others",
    "RDMAV_*": "likewise verbs, as whether a process may fork",
    "TORCH_*": "torch's logs, watchdogs and folders",
    "PYTORCH_*": "PYTORCH_ALLOC_CONF: how torch asks for GPU memory",
    "TORCHINDUCTOR_*": "where compiled layers are kept, and how they are made",
    "TORCHDYNAMO_*": "likewise, of the compiler's first half",
    "TRITON_*": "where Triton's kernels are kept, and how they are made",
    "CUDA_*": "CUDA_DEVICE_ORDER, CUDA_LAUNCH_BLOCKING and their like",
    "CUBLAS_*": "CUBLAS_WORKSPACE_CONFIG: the same sums every time",
    "DS_*": "DS_ACCELERATOR: CPU or GPU; how DeepSpeed builds its operators",
    "OMP_*": "threads of a process; without it each machine counts its own cores",
    "MKL_*": "likewise, of Intel's library",
    "PYTHON*": "PYTHONPATH, and how Python runs",
    "HF_*": "transformers' folders, and that it stays off the network",
    "TRANSFORMERS_*": "likewise, by its older names",
    "TOKENIZERS_PARALLELISM": "threads of the tokenizer",
    "XDG_CACHE_HOME": "where encoded recordings are kept",
    "LD_LIBRARY_PATH": "where drivers' and networks' libraries are",
    "HIGGS_ENGINE_*": "that this is a restart, and which attempt a process belongs to",
}
"""Names, or how they begin, with the reason."""

OF_ONE_MACHINE = frozenset(
    {
        "CUDA_VISIBLE_DEVICES",  # the launcher gives each machine its own
        "DS_ENV_FILE",  # a file of this machine
        "HIGGS_ENGINE_PYTHON",  # for launch/setup_env.sh alone, like the next two
        "HIGGS_ENGINE_TORCH",
        "TORCH_CPU_INDEX",
    }
)
"""What the list above would take, but another machine has no use for."""

SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?(_|$)")


def is_secret(name: str) -> bool:
    return SECRET.search(name.upper()) is not None


def forwarded(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of `env` that go to other machines, in order; none that looks secret or is no line of text."""
    return {name: env[name] for name in sorted(env) if _is_listed(name) and not _is_held_back(name, env[name])}


def held_back(env: Mapping[str, str]) -> dict[str, str]:
    """Names of the list that nevertheless stay here, each with the reason."""
    return {name: why for name in sorted(env) if _is_listed(name) and (why := _is_held_back(name, env[name]))}


def _is_listed(name: str) -> bool:
    if name in OF_ONE_MACHINE:
        return False
    return any(name.startswith(listed[:-1]) if listed.endswith("*") else name == listed for listed in FORWARDED)


def _is_held_back(name: str, value: str) -> str:
    if is_secret(name):
        return "looks like a secret, and would be seen in the list of processes"
    if not value.isprintable():
        return "has line breaks or other characters that cannot be printed"
    return ""


def shown(name: str, value: str) -> str:
    """`NAME=value` for a reader; the value of a secret is not for reading."""
    return f"{name}=(not shown)" if is_secret(name) else f"{name}={value}"


# ---------------------------------------------------------------- DeepSpeed's file


def own_lines(env: Mapping[str, str], cwd: Path) -> dict[str, list[str]]:
    """The user's own files for DeepSpeed: path -> NAME=value lines, without comments, as they stand there.

    Raises:
        ConfigError: a line is neither.
    """
    name = env.get("DS_ENV_FILE", ".deepspeed_env")
    files = dict.fromkeys(os.path.join(folder, name) for folder in (os.path.expanduser("~"), cwd))
    found, problems = {}, []
    for file in filter(os.path.isfile, files):
        lines = Path(file).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        kept = {number: line for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"}
        found[file] = list(kept.values())
        wrong = [number for number, line in kept.items() if not re.match(r"\s*[A-Za-z_]\w*\s*=", line)]
        problems += [f"{file}: line {number} is not NAME=value → mend it, or put # before it" for number in wrong]
    if problems:
        raise ConfigError("the variables for other machines cannot be read", problems)
    return found


def write_file(path: Path, variables: Mapping[str, str], own: Mapping[str, list[str]]) -> None:
    """The file for DS_ENV_FILE: `variables`, then the user's own lines, which win. Only the user can read it."""
    lines = [f"{name}={for_deepspeed(value)}" for name, value in variables.items()]
    lines += [line for lines_of_file in own.values() for line in lines_of_file]
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", errors="surrogateescape") as file:
        file.write("".join(f"{line}\n" for line in lines))


def for_deepspeed(value: str) -> str:
    """A value as its line has to have it, so that the shell of the other machine ends up with exactly this value.

    DeepSpeed strips it and, unless it is plain, puts it between double quotes, in which it masks nothing.
    """
    text = mask(value, '\\$`"')
    return f'""{text}""' if value != value.strip() else text  # the empty strings at its ends keep the spaces


def mask(text: str, special: str) -> str:
    """`text` for between the double quotes of a shell, behind pdsh, which replaces %h, %n, %u and %%."""
    return re.sub(f"([{re.escape(special)}])", r"\\\1", text).replace("%", "$(printf '\\045')")
