"""The machines of a HOSTFILE: one `NAME slots=N` a line, as DeepSpeed reads it; but told with line and remedy."""

import re
from pathlib import Path

LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")


def read_hostfile(path: str) -> tuple[dict[str, int], list[str]]:
    """Name -> processes, in order, and the problems that were met."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        return {}, [f"HOSTFILE={path} {reason} → give a file as launch/hostfile.example"]
    hosts: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = LINE.fullmatch(text)
        if match is None or match.group(2).strip("0") == "":
            problems.append(f"{path}: line {number}: {text!r} is not `NAME slots=N` → as in launch/hostfile.example")
        elif match.group(1) in hosts:
            problems.append(f"{path}: line {number}: {match.group(1)} stands there twice → one line for all its slots")
        else:
            hosts[match.group(1)] = int(match.group(2))
    if not hosts and not problems:
        problems.append(f"HOSTFILE={path} names no machine → one `NAME slots=N` a line, N its processes")
    return hosts, problems
