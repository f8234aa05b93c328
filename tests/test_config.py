"""Settings: sources and their priority, types, limits, contradictions, and how mistakes are told."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from engine.config import FIELDS, GROUPS, Settings, parse, prepare_output_dir
from engine.config_checks import REPOSITORY
from engine.errors import ConfigError


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch):
    """What a run needs, in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for folder in ("higgs", "codec"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "zero2.json").write_text("{}")
    return tmp_path


REQUIRED = ["--model_path", "higgs", "--audio_tokenizer_path", "codec", "--train_data_file", "train.json"]


def parsed(*flags, **yaml_values):
    with open("my.yaml", "w") as file:
        yaml.safe_dump(yaml_values, file)
    return parse(["--config", "my.yaml", *REQUIRED, *flags])


def problems_of(call, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert all("→" in problem for problem in caught.value.problems)
    return caught.value.problems


def problem(*flags, **yaml_values):
    (only,) = problems_of(parsed, *flags, **yaml_values)
    return only


def in_file(text, *flags):
    with open("my.yaml", "w") as file:
        file.write(text)
    return parse(["--config", "my.yaml", *REQUIRED, *flags])


# ---- sources


def test_defaults_then_yaml_then_flags():
    settings = parsed("--seed", "3", warmup_steps=7, seed=2)
    assert (settings.num_train_epochs, settings.warmup_steps, settings.seed) == (3, 7, 3)
    assert parse([*REQUIRED, "--seed=3", "--config", "my.yaml"]).seed == 3  # wherever --config stands
    assert parse(["--seed", "1", *REQUIRED, "--seed", "2"]).seed == 2


def test_import_needs_no_torch():
    code = "import sys, engine.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n", "{}\n"])
def test_empty_yaml_is_no_settings(text):
    assert in_file(text) == parse(REQUIRED)


@pytest.mark.parametrize("flags, value", [
    ([], False), (["--use_lora"], True), (["--use_lora", "true"], True), (["--use_lora", "False"], False),
    (["--use_lora=true"], True), (["--use-lora"], True), (["--use_lora", "--no-use_lora"], False),
    (["--use_lora", "--no_use_lora"], False), (["--use_lora", "--no-use-lora"], False),
])
def test_bool_flags(flags, value):
    assert parsed(*flags, "--seed", "1").use_lora is value


@pytest.mark.parametrize("flags", [
    ["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj,", "v_proj"], ["[q_proj, 'v_proj']"],
])
def test_list_flags(flags):
    settings = parsed("--lora_target_modules", *flags, "--seed", "5")
    assert (settings.lora_target_modules, settings.seed) == (["q_proj", "v_proj"], 5)
    assert parsed(f"--lora_target_modules={','.join(flags)}").lora_target_modules == ["q_proj", "v_proj"]


def test_lists_in_yaml():
    settings = parsed(use_lora=True, lora_target_modules="q_proj, v_proj", codebook_weights=[1, "5e-1", 0])
    assert settings.lora_target_modules == ["q_proj", "v_proj"]
    assert settings.codebook_weights == [1.0, 0.5, 0.0]
    assert all(isinstance(weight, float) for weight in settings.codebook_weights)
    assert parsed("--codebook_weights", "none", codebook_weights=[1, 2]).codebook_weights is None
    assert parsed("--train_modules", "none", train_modules=["a"]).train_modules == []
    assert parsed().lora_target_modules is not parsed().lora_target_modules


@pytest.mark.parametrize("word", ["null", "none", "None"])
def test_cleared(word):
    assert parsed("--save_total_limit", word, "--scene", word).save_total_limit is None
    assert parsed(save_total_limit=None, scene=None).scene is None
    for value in ("", word):
        assert parsed("--eval_data_file", value, eval_data_file="train.json").eval_data_file == []
    assert parsed(eval_data_file=None).eval_data_file == []
    assert parsed("--backend", "none", "--resume", "none").backend == "none"  # a choice, where it is one


@pytest.mark.parametrize("rank", [["--local_rank", "3"], ["--local_rank=3"], ["--local-rank=3"]])
def test_launcher_rank_is_ignored(rank):
    assert parse([*rank, *REQUIRED]) == parse([*REQUIRED, *rank]) == parse(REQUIRED)


def test_every_kept_flag_of_the_seed():
    settings = parse([
        *REQUIRED, "--eval_data_file", "train.json", "--output_dir", "out", "--num_train_epochs", "1",
        "--per_device_train_batch_size", "4", "--learning_rate", "5e-5", "--warmup_steps", "100",
        "--logging_steps", "10", "--save_steps", "500", "--eval_steps", "500", "--use_lora",
        "--lora_rank", "16",
        "--lora_alpha", "32", "--lora_dropout", "0.1", "--seed", "42", "--bf16", "--freeze_audio_tower",
        "--freeze_audio_encoder_proj", "--disable_evaluation",
    ])
    assert settings.use_lora and settings.bf16 and settings.disable_evaluation
    assert settings.per_device_train_batch_size == 4
    assert settings.freeze_audio_tower and parse(REQUIRED).freeze_audio_tower
    assert parse([*REQUIRED, "--freeze_llm"]).freeze_llm


# ---- types


@pytest.mark.parametrize("text, name, value", [
    ("learning_rate: 1e-4", "learning_rate", 1e-4),  # YAML 1.1 takes this for text
    ("learning_rate: 1", "learning_rate", 1.0),
    ("warmup_steps: 2.0", "warmup_steps", 2),
    ("warmup_steps: '7'", "warmup_steps", 7),
    ("warmup_steps: 1e3", "warmup_steps", 1000),
    ("bf16: no", "bf16", False),
    ("scene: A hall.", "scene", "A hall."),
])
def test_types_accepted(text, name, value):
    got = getattr(in_file(text), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text, told", [
    ("learning_rate: abc", "learning_rate: 'abc' is not a number → give a number, such as 5e-05"),
    ("learning_rate: true", "learning_rate: True is not a number → give a number, such as 5e-05"),
    ("learning_rate: [1, 2]", "learning_rate: [1, 2] is not a number → give a number, such as 5e-05"),
    ("learning_rate: .nan", "learning_rate: nan is not a number → give a number, such as 5e-05"),
    ("learning_rate:", "learning_rate: None is not a number → give a number, such as 5e-05"),
    ("seed: 2.5", "seed: 2.5 is not a whole number → give a whole number, such as 42"),
    ("seed: true", "seed: True is not a whole number → give a whole number, such as 42"),
    ("max_steps: x", "max_steps: 'x' is not a whole number → give a whole number"),
    ("use_lora: 2", "use_lora: 2 is neither true nor false → write true or false"),
    ("output_dir: 12", "output_dir: 12 is not text → put it in quotes, such as ./output"),
    ("resume: no", "resume: false is not text → put it in quotes, such as none"),
    ("codebook_weights: [1, a]", "codebook_weights: 'a' is not a number → give a number"),
    ("train_modules: [1]", "train_modules: 1 is not text → put it in quotes"),
    ("seed: {a: 1}", "seed: {'a': 1} is not a whole number → give a whole number, such as 42"),
])
def test_types_refused(text, told):
    assert problems_of(in_file, text) == ["my.yaml: " + told]


def test_large_seed_keeps_its_digits():
    assert parsed("--seed", "4294967295").seed == 4294967295


def test_flag_values_refused():
    assert problem("--lora_alpha", "abc").startswith("command line: lora_alpha: 'abc' is not a number →")
    assert problem("--seed") == "command line: seed: no value follows → write --seed VALUE"
    assert "'now' follows no flag" in problem("--scene", "Speak", "now")
    assert "'maybe' is neither true nor false" in problem("--use_lora", "maybe")
    assert "config: no value follows" in problem("--config")


# ---- names and files


def test_unknown_names_show_their_neighbours():
    told = "unknown setting 'learning_rat' in my.yaml → did you mean learning_rate?"
    assert problem(learning_rat=1) == told
    told = "unknown setting 'lora_rnak' on the command line → did you mean lora_rank?"
    assert problem("--lora-rnak", "8") == problem("--lora_rnak=8") == told
    assert "did you mean save_steps or " in problem("--sav_steps", "8")
    assert problem("--qqq=1", "--seed", "1").endswith("→ --help lists every setting")
    assert "no_seed" in problem("--no-seed")  # only a true/false setting can be switched off
    assert len(problems_of(parsed, "--unknown", "1", "2", "--push_to_hub", "yes")) == 2


def test_sections_are_refused():
    told = problem(training={"seed": 1})
    assert told.startswith("unknown setting 'training' in my.yaml → the settings have no sections: write")


@pytest.mark.parametrize("text, told", [
    ("seed: 1\nscene: x\nseed: 2\n", "my.yaml: line 3: seed is also on line 1 → keep one"),
    ("seed: 1\nscene: [a\n", "my.yaml: line 3, column 1: expected ',' or ']'"),
    ("seed: 1\n\tscene: a\n", "my.yaml: line 2, column 1: found character '\\t'"),
    ("seed 1\n", "my.yaml: holds no settings → give a YAML file of 'name: value' lines"),
    ("- seed\n", "my.yaml: holds no settings"),
    ("seed: 2024-13-45\n", "my.yaml: month must be in 1..12"),
    ("? [a]\n: 1\n", "my.yaml: line 1, column 3: found unhashable key"),
])
def test_bad_yaml_is_located(text, told):
    (only,) = problems_of(in_file, text)
    assert only.startswith(told)


def test_config_that_cannot_be_read():
    (only,) = problems_of(parse, ["--config", "absent.yaml"])  # what it may hold is not called missing
    assert only.startswith("absent.yaml: No such file or directory →")
    with open("latin.yaml", "wb") as file:
        file.write("scene: é".encode("latin-1"))
    assert problems_of(parse, ["--config", "latin.yaml"])[0].startswith("latin.yaml: 'utf-8' codec")
    assert "--config is given 2 times" in problem("--config", "my.yaml")


def test_every_mistake_in_one_error():
    with pytest.raises(ConfigError) as caught:
        in_file("learning_rat: 1\nseed: x\nlora_dropout: 1\n", "--backend", "ddp", "--use_lora",
                "--freeze_llm", "--model_path", "nowhere", "--warmup_steps", "-1", "--resume", "gone")
    assert len(caught.value.problems) == 8
    for words in ("'learning_rat'", "my.yaml: seed", "lora_dropout: 1.0", "backend: 'ddp'",
                  "freeze_llm: LoRA", "model_path: ", "warmup_steps: -1", "resume: "):
        assert words in str(caught.value)


# ---- values


@pytest.mark.parametrize("name, value, told", [
    ("lora_dropout", "1.0", "1.0 is out of range → at least 0 and below 1"),
    ("learning_rate", "0", "0.0 is out of range → above 0"),
    ("max_steps", "-1", "-1 is out of range → at least 1, or null"),
    ("seed", str(2**32), "4294967296 is out of range → at least 0 and below 4294967296"),
    ("codebook_weights", "1,-1", "[1.0, -1.0] is out of range → at least 0, or null"),
    ("attention", "flsh", "'flsh' is not a choice → one of auto, flash, varlen, flex, sdpa"),
    ("lr_scheduler_type", "cos", "'cos' is not a choice → one of linear, cosine, constant"),
])
def test_limits_and_choices(name, value, told):
    assert problem(f"--{name}", value) == f"{name}: {told}"


@pytest.mark.parametrize("limit", [0, -1])
@pytest.mark.parametrize("name", [
    "max_tokens_per_micro_batch", "micro_batches_per_step", "per_device_train_batch_size", "lora_rank",
    "gradient_accumulation_steps", "num_train_epochs", "save_total_limit", "save_steps", "eval_steps",
    "logging_steps",
])
def test_counts_are_positive(name, limit):
    assert problem(**{name: limit}).startswith(f"{name}: {limit} is out of range → at least 1")


@pytest.mark.parametrize("values, told", [
    (dict(use_lora=True, train_modules=["*mlp*"]), "train_modules: LoRA"),
    (dict(use_lora=True, freeze_llm=True), "freeze_llm: LoRA"),
    (dict(use_lora=True, lora_target_modules=[]), "lora_target_modules: no layer"),
    (dict(lora_modules_to_save=["audio_lm_head"]), "lora_modules_to_save: has no meaning"),
    (dict(text_loss_weight=0, audio_loss_weight=0), "text_loss_weight, audio_loss_weight: both are 0"),
    (dict(codebook_weights=[0, 0]), "codebook_weights: no codebook"),
    (dict(codebook_weights=[]), "codebook_weights: no codebook"),
    (dict(prompt_layout="as_written", train_reference=True), "train_reference: as_written has no turn of"),
    (dict(prompt_layout="reference_in_system", train_reference=True), "train_reference: reference_in_system has no"),
    (dict(prompt_layout="single_speaker", train_reference=True), "train_reference: single_speaker has no turn"),
    (dict(prompt_layout="single_speaker_smart_voice", train_reference=True), "train_reference: single_speaker has"),
    (dict(prompt_layout="as_written", reference_dropout=0.1), "reference_dropout: as_written has no reference"),
    (dict(prompt_layout="single_speaker", reference_dropout=0.1), "reference_dropout: single_speaker has no"),
    (dict(prompt_layout="as_written", pair_references=True), "pair_references: as_written has no place for"),
    (dict(prompt_layout="single_speaker", pair_references=True), "pair_references: single_speaker has no place"),
    (dict(data_weights=[1, 2]), "data_weights: 2 weight(s), but 1 train_data_file → one for each"),
    (dict(data_weights=[]), "data_weights: 0 weight(s), but 1 train_data_file"),
    (dict(data_weights=[0]), "data_weights: [0.0] is out of range → above 0, or null"),
    (dict(min_seconds=5, max_seconds=5), "min_seconds: 5 is not below max_seconds = 5 → lower it"),
    (dict(whisper_conditioning="train.json"), "whisper_conditioning: "),
    (dict(whisper_conditioning="gone"), "whisper_conditioning: "),
    (dict(fsdp_replicas=2), "fsdp_replicas: has no meaning"),
    (dict(bf16=True, backend="none"), "bf16: backend none computes in fp32 only → set backend to fsdp"),
])
def test_contradictions(values, told):
    assert problem(**values).startswith(told)


@pytest.mark.parametrize("values", [
    dict(train_reference=True), dict(train_reference=True, prompt_layout="multi_speaker_voice_cloning"),
    dict(pair_references=True, reference_dropout=0.5, prompt_layout="reference_in_system"),
    dict(min_seconds=5, max_seconds=5.1), dict(data_weights=0.5), dict(whisper_conditioning="codec"),
])
def test_no_contradictions(values):
    settings = parsed(**values)
    assert all(getattr(settings, name) for name in values)


def test_missing_settings_name_their_flag():
    problems = problems_of(parse, [])
    assert [told.split(" → ")[0] for told in problems] == [
        "model_path: missing", "audio_tokenizer_path: missing", "train_data_file: missing"]
    assert "give --model_path FOLDER" in problems[0] and "give --train_data_file DATA" in problems[2]
    problems = problems_of(parse, ["--model_path", "--audio_tokenizer_path", "codec"])
    assert len(problems) == 2 and "missing" not in problems[0]  # told once: it has no value


# ---- paths


def test_paths_are_absolute(inputs, monkeypatch):
    monkeypatch.setenv("HOME", str(inputs))
    settings = parsed("--model_path", "~/higgs", "--output_dir", "a/../out", "--resume", "codec")
    assert settings.model_path == str(inputs / "higgs")
    assert settings.output_dir == str(inputs / "out")
    assert settings.resume == str(inputs / "codec")
    assert settings.codes_cache_dir == str(inputs / ".cache/higgs-engine/codes")
    monkeypatch.setenv("XDG_CACHE_HOME", str(inputs / "xdg"))
    assert parsed().codes_cache_dir == str(inputs / "xdg/higgs-engine/codes")


def test_paths_that_are_not_there():
    remedy = "gone does not exist → give a file or folder of samples, or a prepared store"
    for name in ("train_data_file", "eval_data_file"):
        told = problem(f"--{name}", "train.json", "gone")
        assert told.startswith(f"{name}: /") and told.endswith(remedy), "each of several is looked for"
    assert parsed("--eval_data_file", "codec").eval_data_file == [os.path.abspath("codec")], "data may be a folder"
    assert "resume: " in problem("--resume", "train.json") and "resume: " in problem("--resume", "")
    assert problem("--output_dir", "").startswith("output_dir: missing → give --output_dir FOLDER")
    told = problem("--model_path", "someone/higgs-arabic")
    assert "reaches no model hub" in told and "hf download someone/higgs-arabic " in told
    assert "download bosonai/higgs-audio-v2-tokenizer " in problem("--audio_tokenizer_path", "/no/such")


def test_data_are_lists_of_paths(inputs):
    (inputs / "a, b.json").write_text("[]")
    (inputs / "c.json").write_text("[]")
    both = [str(inputs / "a, b.json"), str(inputs / "c.json")]
    for name in ("train_data_file", "eval_data_file"):
        assert getattr(parsed(f"--{name}", "a, b.json", "c.json", "--seed", "1"), name) == both
        assert getattr(parsed(f"--{name}=a, b.json"), name) == both[:1], "a comma may belong to a path"
    required = REQUIRED[:4]
    for data, wanted in [(["a, b.json", "c.json"], both), ("a, b.json", both[:1]), ("c.json", both[1:])]:
        with open("data.yaml", "w") as file:
            yaml.safe_dump({"train_data_file": data}, file)
        assert parse(["--config", "data.yaml", *required]).train_data_file == wanted
    settings = parsed("--train_data_file", "a, b.json", "c.json", "--data_weights", "0.5,2", "--output_dir", "out")
    settings.to_yaml("again.yaml")
    assert parse(["--config", "again.yaml"]).train_data_file == both and settings.data_weights == [0.5, 2.0]


def test_stores_need_no_codec(inputs):
    (inputs / "store").mkdir()
    (inputs / "store" / "header.json").write_text("{}")
    flags = ["--model_path", "higgs", "--train_data_file"]
    assert parse([*flags, "store"]).audio_tokenizer_path is None
    assert parse([*flags, "store", "--eval_data_file", "store"]).audio_tokenizer_path is None
    for more in (["store", "train.json"], ["store", "--eval_data_file", "train.json"]):
        assert problems_of(parse, [*flags, *more])[0].startswith("audio_tokenizer_path: missing → give")
    assert problems_of(parse, flags[:2])[0].startswith("audio_tokenizer_path: missing"), "no data are not all stores"
    assert parse([*flags, "train.json"], optional=["audio_tokenizer_path"]).audio_tokenizer_path is None


def test_ds_config_is_found(inputs, monkeypatch):
    assert parsed(ds_config="zero2").ds_config == str(inputs / "zero2.json")
    assert parsed(ds_config="zero2.json").ds_config == str(inputs / "zero2.json")
    repository = inputs / "repository"
    (repository / "ds_configs").mkdir(parents=True)
    (repository / "ds_configs" / "zero7.json").write_text("{}")
    monkeypatch.setattr("engine.config_checks.REPOSITORY", repository)
    for name in ("zero7", "zero7.json", "ds_configs/zero7.json", "ds_configs/zero7"):
        assert parsed(ds_config=name).ds_config == str(repository / "ds_configs/zero7.json")
    assert problem(ds_config="zero9") == "ds_config: there is no 'zero9' → a JSON file, or one of: zero7"
    assert parsed(ds_config="zero9", backend="fsdp").ds_config == "zero9"


def test_output_dir_is_made_or_refused(inputs):
    settings = parsed("--output_dir", "deep/out")
    prepare_output_dir(settings)
    prepare_output_dir(settings)
    assert os.listdir(settings.output_dir) == []
    for path in ("train.json", "train.json/out"):
        assert str(inputs / "train.json") in problems_of(prepare_output_dir, parsed("--output_dir", path))[0]


# ---- what is written and resolved


def test_yaml_round_trip(inputs, monkeypatch):
    settings = parsed(
        "--use_lora", "--lora_target_modules", "q_proj", "--scene", "Ein Café: «no» # 1",
        "--learning_rate", "3e-7", "--system_prompt", "true", "--codebook_weights", "1,0.5",
        "--save_total_limit", "none", "--ds_config", "zero2",
    ).with_resolved(2, has_gpu=True)
    settings.to_yaml(inputs / "config.yaml")
    monkeypatch.chdir("/")
    assert parse(["--config", str(inputs / "config.yaml")]) == settings
    text = (inputs / "config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"^# ([\w ]+):", text, re.M)[1:] == list(GROUPS)
    assert re.findall(r"^(\w+):", text, re.M) == list(FIELDS)
    assert "Ein Café" in text and not list(inputs.glob("*.tmp"))


def test_from_yaml_asks_for_no_files(inputs):
    settings = parsed("--seed", "9")
    settings.to_yaml("config.yaml")
    (inputs / "train.json").unlink()
    assert Settings.from_yaml("config.yaml") == settings
    (inputs / "config.yaml").write_text("seed: -1\nsed: 2\nwarmup_steps: x\n")
    assert len(problems_of(Settings.from_yaml, "config.yaml")) == 3


@pytest.mark.parametrize("tokens, samples, total, each, world_size, expected", [
    (None, None, None, None, 1, (8192, None, 1)),
    (None, None, None, None, 4, (8192, None, 4)),
    (None, 3, None, None, 1, (None, 3, 1)),
    (4096, 3, None, 2, 4, (4096, 3, 8)),
    (4096, None, 8, None, 4, (4096, None, 8)),
    (4096, None, 9, None, 4, (4096, None, 9)),
    (4096, None, 8, 2, 4, (4096, None, 8)),
    (4096, None, 8, 3, 4, "8 is not gradient_accumulation_steps × processes = 3 × 4 → give only one of them, "
                          "or --micro_batches_per_step 12"),
    (4096, None, 3, None, 4, "3 leaves some of 4 processes idle → set at least 4, or start at most 3"),
])
def test_batches_are_resolved(tokens, samples, total, each, world_size, expected):
    settings = Settings(
        max_tokens_per_micro_batch=tokens, per_device_train_batch_size=samples,
        micro_batches_per_step=total, gradient_accumulation_steps=each)
    if isinstance(expected, str):
        (only,) = problems_of(settings.with_resolved, world_size, False)
        assert only == f"micro_batches_per_step: {expected}"
        return
    resolved = settings.with_resolved(world_size, False)
    assert (resolved.max_tokens_per_micro_batch, resolved.per_device_train_batch_size,
            resolved.micro_batches_per_step) == expected
    assert resolved.gradient_accumulation_steps is None
    assert resolved.with_resolved(1, False) == resolved  # the same steps on another number of processes


@pytest.mark.parametrize("backend, bf16, has_gpu, expected", [
    ("fsdp", None, True, True), ("fsdp", None, False, False), ("fsdp", True, False, True),
    ("fsdp", False, True, False), ("none", None, True, False), ("none", False, True, False),
])
def test_precision_is_resolved(backend, bf16, has_gpu, expected):
    assert Settings(backend=backend, bf16=bf16).with_resolved(1, has_gpu).bf16 is expected


def test_backends_and_world_sizes():
    assert Settings(backend="none").with_resolved(1, False).backend == "none"
    assert Settings(backend="fsdp", fsdp_replicas=2).with_resolved(4, False).fsdp_replicas == 2
    assert "backend: none is one process" in problems_of(Settings(backend="none").with_resolved, 2, False)[0]
    told = problems_of(Settings(backend="fsdp", fsdp_replicas=3).with_resolved, 4, False)
    assert told == ["fsdp_replicas: 4 processes cannot hold 3 equal copies → a divisor of 4"]


# ---- help


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_complete(flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        parse([flag], prog="higgs-engine train")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and text.startswith("usage: higgs-engine train ")
    sections = re.split(rf"^({'|'.join(GROUPS)}):$", text, flags=re.M)  # [intro, title, body, title, body, …]
    assert sections[1::2] == list(GROUPS)
    for title, body in zip(sections[1::2], sections[2::2], strict=True):
        names = [name for name, field in FIELDS.items() if field.metadata["group"] == title]
        assert names and re.findall(r"^  --(\w+)", body, re.M) == names
    assert "default: 5e-05" in text and text.count("required") == 3
    for field in FIELDS.values():
        assert len(field.metadata["help"]) > 10
        assert all(choice in text for choice in field.metadata["choices"])


@pytest.mark.parametrize("flags, mode", [
    ([], "auto"), (["--gradient_checkpointing"], "full"), (["--gradient-checkpointing"], "full"),
    (["--no-gradient_checkpointing"], "none"), (["--gradient_checkpointing", "false"], "none"),
    (["--gradient_checkpointing=true"], "full"), (["--gradient_checkpointing", "none"], "none"),
    (["--gradient_checkpointing", "selective"], "selective"),
])
def test_a_choice_with_a_switch(flags, mode):
    """Scripts that know it as a bool mean what they meant, flags and YAML alike."""
    assert parsed(*flags, "--seed", "1").gradient_checkpointing == mode
    assert parsed(gradient_checkpointing={"full": True, "none": False}.get(mode, mode)).gradient_checkpointing == mode
    assert "'sometimes' is not a choice" in problem("--gradient_checkpointing", "sometimes")
