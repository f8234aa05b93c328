"""Settings: a file or a command line is taken, or refused with a ConfigError; it runs nothing and writes nothing."""

import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.config import FIELDS, Settings, parse
from engine.errors import ConfigError
from tests.fuzz.hostile import BYTES, TEXTS, damaged, values
from tests.fuzz.watched import inputs, little_memory, outcome

NAMES = sorted(FIELDS)
TAGS = ("int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs", "str", "seq", "map", "merge",
        "python/name:os.system", "python/object/apply:os.system", "python/module:os", "python/tuple")  # fmt: skip
CONTENTS = ("", "x", "1", "[]", "[a, b]", "{a: b}", "'..'", "0x", "0b", "1:2:3", "2001-13-45", "aGk=", "*a", "[*a, *a]")
VALID = (
    b"# a run\nmodel_path: &m model\ntrain_data_file: [a.json, b.json]\nlearning_rate: 1e-4\nuse_lora: yes\n"
    b"lora_target_modules: [q_proj, v_proj]\noutput_dir: 'out'\nseed: 7\nresume: *m\nbf16: null\n"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    before = os.getcwd()
    os.chdir(folder)
    with little_memory():
        yield folder / "my.yaml"
    os.chdir(before)


def check(file) -> None:
    for read in (lambda: parse(["--config", str(file)]), lambda: Settings.from_yaml(file)):
        found = outcome(read)
        assert isinstance(found, Settings | ConfigError)
    if isinstance(found, Settings) and found.output_dir:  # `from_yaml` asks for no path
        # what was accepted is written such that it says the same
        again = file.with_name("again.yaml")
        outcome(lambda: found.to_yaml(again), may_change=file.parent)
        assert Settings.from_yaml(again) == found


@inputs(150)
@given(st.dictionaries(st.sampled_from(NAMES) | st.sampled_from(TEXTS), values, max_size=4))
def test_odd_values(file, given_values):
    text = yaml.safe_dump(given_values, allow_unicode=False)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    check(file)


@inputs(200)
@given(st.sampled_from(NAMES), st.sampled_from(TAGS), st.sampled_from(CONTENTS), st.booleans())
def test_tags_and_aliases(file, name, tag, content, in_key):
    place = f"!!{tag} {content}"
    file.write_text(f"seed: &a 1\n? {place}\n: {name}\n" if in_key else f"seed: &a 1\n{name}: {place}\n")
    check(file)


@inputs(200)
@given(damaged(VALID) | st.binary(max_size=60) | st.lists(st.sampled_from(BYTES), max_size=5).map(b"".join))
def test_damaged_text(file, content):
    file.write_bytes(content)
    check(file)


WORDS = st.sampled_from(
    [*TEXTS, *(f"--{name}" for name in NAMES), *(f"--{name}=" for name in NAMES), "--", "--=", "--config", "--no-seed",
     "--no-bf16", "none", "1", "-1", "[a,b]", "a,b", "1e-4", "--config=/dev/null", "--config=."]
)  # fmt: skip


@inputs(250)
@given(st.lists(WORDS | st.text(max_size=6).filter(lambda word: word not in ("-h", "--help")), max_size=8))
def test_command_lines(file, words):
    assert isinstance(outcome(lambda: parse(words)), Settings | ConfigError)
