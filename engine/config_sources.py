"""Where settings come from: their declaration, YAML files, flags and `--help`; every mistake is told at once.

Nothing here knows a particular setting: a `Schema` says which names there are, of what type, with what default.
"""

import argparse
import dataclasses
import difflib
import math
import operator
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

LIMITS = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt}
TRUTH = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
MOST_TEXT = 1 << 20
"""Bytes of a settings file, and characters of what it says with every alias written out; all settings take 10 KB."""
MOST_DEPTH = 20
"""Lists within lists of a settings file, whose settings are two deep; to look further ahead takes PyYAML minutes."""
MOST_SHOWN = 200
"""Characters of a wrong value that a message repeats."""
METAVARS = {bool: "[BOOL]", int: "N", float: "X", str: "TEXT", list[str]: "A ...", list[float]: "X ..."}


def setting(
    group: str,
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    path: str = "",
    required: bool = False,
    switch: Mapping[bool, str] | None = None,
    **limits: float,
) -> Any:
    """A dataclass field with what is known of a setting.

    Args:
        path: FILE or FOLDER.
        switch: the choices that true and false stand for; such a setting is also written as a bool is.
        limits: as in `LIMITS`.
    """
    rule = " and ".join(f"{word.replace('_', ' ')} {limit}" for word, limit in limits.items())
    metadata = dict(
        group=group, default=default, help=help, choices=choices, path=path, required=required, switch=switch,
        limits=limits, rule=rule,
    )  # fmt: skip
    initial = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(metadata=metadata, **initial)


@dataclasses.dataclass(frozen=True)
class Schema:
    """The settings by name: `fields` with their metadata, `kinds` of value, and which of them may be None."""

    fields: Mapping[str, dataclasses.Field]
    kinds: Mapping[str, Any]
    optional: frozenset[str]

    def is_switch(self, name: str) -> bool:
        """Whether its flag may stand alone, and with `no-` before it."""
        return self.kinds.get(name) is bool or name in self.fields and bool(self.fields[name].metadata["switch"])

    @classmethod
    def of(cls, settings: type) -> "Schema":
        hints = get_type_hints(settings)
        optional = frozenset(name for name, hint in hints.items() if NoneType in get_args(hint))
        kinds = {name: get_args(hint)[0] if name in optional else hint for name, hint in hints.items()}
        return cls({field.name: field for field in dataclasses.fields(settings)}, kinds, optional)


class Reading:
    """What the sources say: `values`, the `problems` met, and the settings that `failed` to be read."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.values: dict[str, Any] = {}
        self.problems: list[str] = []
        self.failed: set[str] = set()

    def read_arguments(self, argv: Iterable[str]) -> None:
        """Takes a command line, and before its flags, which are stronger, the file that its `--config` names."""
        flags = self._split_flags(argv)
        configs = [path for name, path in flags if name == "config"]
        for path in configs[:1]:
            self.read_yaml(path)
        if len(configs) > 1:
            self.problems.append(f"--config is given {len(configs)} times → keep one; flags override it")
        for name, value in flags:
            if name != "config":
                self._take(name, value, "command line")

    def read_yaml(self, path: str) -> None:
        try:
            lines, tree = _yaml_mapping(path)
        except (OSError, ValueError, RuntimeError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            what = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}" if mark else error
            what = getattr(error, "strerror", None) or what
            self.problems.append(f"{path}: {what} → give a YAML file of 'name: value' lines")
            self.failed.update(self.schema.fields)
            return
        firsts: dict[str, int] = {}
        for key, line in lines:
            if firsts.setdefault(key, line) != line:
                self.problems.append(f"{path}: line {line}: {_cut(key)} is also on line {firsts[key]} → keep one")
        for name, value in tree.items():
            self._take(str(name), value, path)

    def _take(self, name: str, value: Any, source: str) -> None:
        if name in self.schema.fields:
            try:
                self.values[name] = _convert(self.schema, name, value)
            except ValueError as error:
                self.problems.append(f"{source}: {name}: {error}")
                self.failed.add(name)
            return
        close = difflib.get_close_matches(name, self.schema.fields, n=3, cutoff=0.7)
        remedy = f"did you mean {' or '.join(close)}?" if close else "--help lists every setting"
        if isinstance(value, dict):
            remedy = "the settings have no sections: write what it holds at the top level"
        where = "on the command line" if source == "command line" else f"in {source}"
        self.problems.append(f"unknown setting {_cut(repr(name))} {where} → {remedy}")

    def _split_flags(self, argv: Iterable[str]) -> list[tuple[str, str | list[str]]]:
        """The (name, value) pairs of a command line, `config` among them, in its order; of a list all its words."""
        flags, tokens, kinds = [], deque(argv), {**self.schema.kinds, "config": str, "local_rank": int}
        while tokens:
            token = tokens.popleft()
            flag, equals, text = token.removeprefix("--").partition("=")
            name = flag.replace("-", "_")
            if not token.startswith("--"):
                self.problems.append(f"{token!r} follows no flag → write --NAME VALUE, spaces in quotes")
                continue
            if name.startswith("no_") and self.schema.is_switch(name[3:]) and not equals:
                flags.append((name[3:], "false"))
                continue
            # An unknown flag takes all that follows, like a list, so that one mistake is not told twice.
            kind, values = kinds.get(name, list[str]), [text] if equals else []
            most = 0 if equals else len(tokens) if get_origin(kind) is list else 1
            while tokens and len(values) < most and not tokens[0].startswith("--"):
                values.append(tokens.popleft())
            if not values and name in kinds and not self.schema.is_switch(name):
                self.problems.append(f"command line: {name}: no value follows → write --{name} VALUE")
                self.failed.add(name)
            elif name != "local_rank":  # added by launchers; the rank itself comes from the environment
                is_list = get_origin(kind) is list and name in kinds
                flags.append((name, values if is_list else ",".join(values or ["true"])))
        return flags


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise ValueError("nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _yaml_mapping(path: str) -> tuple[list[tuple[str, int]], dict]:
    """The keys of a YAML file with their lines, and what they say. Plain values come of it, whatever is in the file.

    Raises:
        OSError, ValueError, RuntimeError (no such home folder), yaml.YAMLError: it cannot be read, or is no mapping.
    """
    with Path(path).expanduser().open("rb") as file:
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise ValueError(f"holds more than {MOST_TEXT:,} bytes, which no settings do")
    loader = _Loader(content.decode())
    try:
        node = loader.get_single_node()
        if node is None:
            return [], {}
        _require_short(node)
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        lines = [(str(key.value), key.start_mark.line + 1) for key, _ in pairs]
        tree = loader.construct_document(node)
    except (ValueError, yaml.YAMLError):
        raise
    except Exception as error:  # PyYAML's constructors stumble over values that are not what their !!tag says
        raise ValueError(f"a value is not what its tag says ({type(error).__name__}: {_cut(str(error))})") from None
    finally:
        loader.dispose()
    if tree is not None and not isinstance(tree, dict):
        raise ValueError("holds no settings")
    return lines, tree or {}


def _require_short(node: yaml.Node) -> None:
    """Aliases of aliases stand for more than memory holds, and are written out where a value is told or merged.

    Raises:
        ValueError: more than `MOST_TEXT` characters, or a value within itself.
    """
    sizes: dict[int, int | None] = {}

    def size(part: yaml.Node | tuple) -> int:
        if id(part) not in sizes:
            sizes[id(part)] = None
            parts = part if isinstance(part, tuple) else part.value
            sizes[id(part)] = 1 + (len(parts) if isinstance(parts, str) else sum(map(size, parts)))
        if sizes[id(part)] is None:
            raise ValueError("a value holds itself by an alias")
        return sizes[id(part)]

    if size(node) > MOST_TEXT:
        raise ValueError(f"stands for more than {MOST_TEXT:,} characters by its aliases")


def help_text(prog: str, schema: Schema, groups: Mapping[str, str]) -> str:
    """`--help`: every setting once, under its group, with its unit, limits and default."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--setting VALUE ...]",
        description="A setting is a flag here and a key of the YAML file; the flag is stronger. A list takes "
        "values with spaces or commas between them. A true/false setting alone means true, and --no-NAME is "
        "false. The word none clears a setting that may be empty.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of 'name: value' lines")
    sections = {group: parser.add_argument_group(group, text) for group, text in groups.items()}
    for name, field in schema.fields.items():
        about = field.metadata
        metavar = about["path"] or METAVARS[schema.kinds[name]]
        if about["choices"]:
            metavar = f"{{{','.join(about['choices'])}}}"
        notes = [about["rule"], "required" if about["required"] else f"default: {_shown(about['default'])}"]
        text = f"{about['help']} ({'; '.join(filter(None, notes))})".replace("%", "%%")
        sections[about["group"]].add_argument(f"--{name}", metavar=metavar, help=text)
    return parser.format_help()


def _convert(schema: Schema, name: str, value: Any) -> Any:
    """`value`, from YAML or as text, in the type of setting `name`; a ValueError says what → remedy."""
    kind, default = schema.kinds[name], schema.fields[name].metadata["default"]
    single = value[0] if isinstance(value, list) and len(value) == 1 else value
    cleared = value is None or isinstance(single, str) and single.lower() in ("null", "none")
    if cleared and (name in schema.optional or get_origin(kind) is list):
        return None if name in schema.optional else []
    switch = schema.fields[name].metadata["switch"]
    if switch and _shown(value).lower() in TRUTH:
        return switch[TRUTH[_shown(value).lower()]]
    if get_origin(kind) is not list:
        return _scalar(value, kind, "" if default is None else f", such as {_shown(default)}")
    words = value if isinstance(value, list) else [value]
    if not schema.fields[name].metadata["path"]:  # a path may hold a comma
        words = [part for word in words for part in (_words(word) if isinstance(word, str) else [word])]
    return [_scalar(item, get_args(kind)[0], "") for item in words]


def _words(text: str) -> list[str]:
    """The items of a list that was written as one word: `a,b` or `[a, b]`."""
    text = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return [part.strip(" '\"") for part in text.split(",") if part.strip()]


def _scalar(value: Any, kind: type, example: str) -> Any:
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{_cut(_shown(value))} is not text → put it in quotes{example}")
        if re.search("[\0\ud800-\udfff]", value):  # no file can be named so, and none can hold it as UTF-8
            raise ValueError(f"{_cut(ascii(value))} holds what is no character → write it in UTF-8, without NUL")
        return value
    if kind is bool:
        if _shown(value).lower() not in TRUTH:
            raise ValueError(f"{_cut(_quoted(value))} is neither true nor false → write true or false")
        return TRUTH[_shown(value).lower()]
    try:
        number = value
        if isinstance(value, str):  # also from YAML, which takes 1e-4 for text
            number = int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
        if isinstance(number, bool) or not math.isfinite(number) or kind(number) != number:
            raise ValueError
        return kind(number)
    except (ValueError, TypeError, OverflowError):
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{_cut(_quoted(value))} is not {what} → give {what}{example}") from None


def _shown(value: Any) -> str:
    """A value as a user would write it."""
    if isinstance(value, list):
        return " ".join(map(_shown, value)) or "none"
    text = _quoted(value, str)
    return text.lower() if value is None or isinstance(value, bool) else text


def _quoted(value: Any, write: Callable[[Any], str] = repr) -> str:
    try:
        return write(value)
    except ValueError:  # Python writes no integer of thousands of digits
        return "a number of thousands of digits"


def _cut(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}… ({len(text):,} characters)"
