"""The examples of the formats' README are data of the format that they stand under."""

import re

import pytest

from engine.data.formats import FORMAT_NAMES, FORMATS, detect, read_conversations
from tests.processes import ROOT

README = (ROOT / "engine/data/formats/README.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL))
EXAMPLES = [
    (name, info, text)
    for name, section in SECTIONS.items()
    for info, text in re.findall(r"^```([^\n]+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
]


def test_every_format_has_its_section_with_an_example():
    assert tuple(SECTIONS) == FORMAT_NAMES == tuple(dict.fromkeys(name for name, *_ in EXAMPLES))
    table = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\) \| (.*?) \|", README, re.MULTILINE)
    assert [name for name, link, _ in table if name == link] == list(FORMAT_NAMES)
    for name, _, files in table:
        assert all(suffix in files for suffix in FORMATS[name].suffixes or ("folder",))


@pytest.mark.parametrize("name, info, text", [e for e in EXAMPLES if e[0] not in ("chatml_parquet", "wav_txt")])
def test_an_example_is_read_as_its_format(name, info, text, tmp_path):
    kind, _, file = info.partition(" ")
    (tmp_path / (file or f"data.{kind}")).write_text(text)
    if name == "ljspeech":
        (tmp_path / "wavs").mkdir()
    path = tmp_path if file else tmp_path / f"data.{kind}"
    assert detect(path) == name
    assert len(read_conversations(path)) == 2


def test_the_tree_of_wav_txt_is_read_as_it(tmp_path):
    ((_, _, tree),) = [example for example in EXAMPLES if example[0] == "wav_txt"]
    for line in tree.splitlines():
        file, _, text = line.partition(" ")
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text.strip())
    assert detect(tmp_path) == "wav_txt"
    assert [(c.messages[0].texts, c.speaker) for c in read_conversations(tmp_path)] == [
        (["Hello there."], None), (["Good morning."], "ann"),
    ]  # fmt: skip


def test_the_columns_of_parquet_are_those_written():
    from engine.data.formats.chatml_parquet import schema

    ((_, _, columns),) = [example for example in EXAMPLES if example[0] == "chatml_parquet"]
    assert columns.splitlines() == [f"{field.name}: {field.type}" for field in schema()]
