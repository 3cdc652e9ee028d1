"""What a recipe may say, what is said back when it may not, and where."""

import dataclasses
import inspect
import json
import pickle
import re
import subprocess
import sys
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from qlora.complaints import NEEDLESS, RENAMED, RENAMED_IN_ROW
from qlora.config import Config, DatasetConfig, LoraSection, QuantizationConfig, TrainingConfig
from qlora.errors import Problem, QLoRAError, RecipeError
from qlora.knobs import fields_of, knobs
from qlora.recipe import dump_recipe, load_recipe, parse_recipe

MINIMAL = "model: {model_name_or_path: base}\ndata: {datasets: [{path: rows.jsonl}]}\n"  # two lines


def config(more: str = "", *overrides: str) -> Config:
    """The Config of the smallest recipe and `more`, which starts on line 3."""
    return parse_recipe(MINIMAL + more, "r.yaml", overrides)


def complaints(more: str = "", *overrides: str, base: str = MINIMAL) -> list[str]:
    """What is said about a recipe that cannot be used, one text for each problem."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(base + more, "r.yaml", overrides)
    return [str(problem) for problem in caught.value.problems]


def with_knob(key: str, value: str) -> tuple[str, int]:
    """The smallest recipe with one knob more, spelt `value`, and the line that it is on."""
    sections = {"model": ["model_name_or_path: base"], "data": ["datasets: [{path: rows.jsonl}]"]}
    section, _, leaf = key.rpartition(".")
    sections.setdefault(section, []).append(f"{leaf}: {value}")
    lines = [line for name, body in sections.items() for line in (f"{name}:", *(f"  {knob}" for knob in body))]
    return "\n".join(lines), lines.index(f"  {leaf}: {value}") + 1


# --- a recipe that is fine


def test_the_smallest_recipe_names_a_model_and_rows():
    got = config()
    assert (got.method, got.model.model_name_or_path) == ("qlora", "base")
    assert got.data.datasets == [DatasetConfig(path="rows.jsonl")]


def test_a_section_left_empty_has_its_defaults():
    assert config("training:\nlora: # later\n") == config()


def test_a_recipe_is_read_from_a_file_with_its_paths_left_as_they_are(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL, encoding="utf-8-sig")  # with the mark that Windows' editors put first
    assert load_recipe(path) == load_recipe(str(path)) == config()
    assert load_recipe(path).data.datasets[0].path == "rows.jsonl"


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        config().training.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_json_is_a_recipe_too():
    values = config("training: {learning_rate: 3e-5, report_to: [wandb]}").model_dump()
    assert parse_recipe(json.dumps(values)) == config("training: {learning_rate: 3e-5, report_to: [wandb]}")


def test_adamw_is_another_name_for_adamw_torch():
    assert config("training: {optim: adamw}").training.optim == "adamw_torch"


@pytest.mark.parametrize(
    ("written", "read"), [("wandb", ["wandb"]), ("[wandb, trackio]", ["wandb", "trackio"]), ("none", []), ("[]", [])]
)
def test_trackers_are_one_or_a_list(written, read):
    assert config(f"training: {{report_to: {written}}}").training.report_to == read


@pytest.mark.parametrize("how", ["true", "false", "gaussian", "pissa", "pissa_niter_16", "olora", "orthogonal", "mica"])
def test_adapters_start_as_peft_names_it(how):
    want = {"true": True, "false": False}.get(how, how)
    assert config(f"lora: {{init_lora_weights: {how}}}").lora.init_lora_weights == want


def test_warmup_steps_take_the_place_of_the_default_ratio():
    got = config("training: {warmup_steps: 10}").training
    assert (got.warmup_steps, got.warmup_ratio) == (10, 0.0)


def test_a_constant_schedule_has_no_warmup():
    assert config("training: {lr_scheduler_type: constant}").training.warmup_ratio == 0.0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_ignore_quantization_so_that_one_word_changes_the_method(method):
    assert config(f"method: {method}\nquantization: {{load_in_4bit: false}}").method == method
    assert config(f"method: {method}\nquantization: {{load_in_4bit: true}}").method == method


# --- YAML 1.2


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("1.e-5", 1e-5),
        (".5", 0.5),
        ("+1", 1.0),
        ("010", 10.0),
        ("0x10", 16.0),
        ("0o17", 15.0),
    ],
)
def test_a_number_is_a_number_however_it_is_spelt(written, read):
    assert config(f"training: {{learning_rate: {written}}}").training.learning_rate == read


@pytest.mark.parametrize(
    "word",
    ["no", "yes", "on", "off", "n", "NO", "2024-01-01", "1:30", "1_000", "0b11", "=", "e5", "1e", ".inf.", "null."],
)
def test_text_that_yaml_1_1_takes_for_something_else_is_text(word):
    assert parse_recipe(with_knob("model.revision", word)[0]).model.revision == word


@pytest.mark.parametrize("word", ["1e5", "0x1f", "12", "1.5", "true", "null", "~", ".inf"])
def test_text_that_looks_like_something_else_is_quoted(word):
    assert config(f"lora: {{target_modules: ['{word}', !!str {word}]}}").lora.target_modules == [word, word]
    assert complaints(f"lora: {{target_modules: [{word}]}}")


def test_an_anchor_can_be_used_again():
    got = config("lora: {target_modules: &names [q_proj], exclude_modules: *names}")
    assert got.lora.exclude_modules == ["q_proj"]


# --- what is wrong, and where


def test_every_problem_of_a_file_is_told_at_once_in_the_order_of_lines():
    text = """\
method: qlorra
model:
  model_name_or_path: base
  dtype: bf16
lora:
  r: 0
  r: 16
  target_modules: [q_proj, 3]
data:
  datasets:
    - path: a.jsonl
      splt: train
    - weight: 1
training:
  lerning_rate: 1e-4
  warmup_steps: ten
learning_rate: 1e-4
"""
    assert complaints(text, base="") == [
        "r.yaml:1: `method` expects `qlora`, `lora` or `full`, got the text `qlorra`\n  did you mean `qlora`?",
        "r.yaml:4: `model.dtype` expects `bfloat16`, `float16` or `float32`, got the text `bf16`\n"
        "  did you mean `bfloat16`?",
        "r.yaml:6: `lora.r` must be at least 1, got `0`",
        "r.yaml:7: duplicate key `lora.r`, first set on line 6\n  keep one of them",
        'r.yaml:8: `lora.target_modules.1` expects text, got `3`\n  put it in quotes: "3"',
        "r.yaml:12: unknown key `data.datasets.0.splt`\n  did you mean `data.datasets.0.split`?",
        "r.yaml:13: missing `data.datasets.1.path`\n"
        "  A JSONL, JSON, CSV or Parquet file, a directory of them, or a hub name",
        "r.yaml:15: unknown key `training.lerning_rate`\n  did you mean `training.learning_rate`?",
        "r.yaml:16: `training.warmup_steps` expects a whole number, got the text `ten`",
        "r.yaml:17: unknown key `learning_rate`\n  did you mean `training.learning_rate`?",
    ]


def test_an_error_holds_its_problems_as_data_and_survives_pickling():
    with pytest.raises(RecipeError) as caught:
        config("lora: {rr: 1}")
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.problems == (Problem("r.yaml", 3, "lora.rr", "unknown key `lora.rr`", error.problems[0].hint),)
    assert isinstance(error, QLoRAError) and error.report() == str(caught.value)


def test_other_errors_are_reported_under_their_name():
    assert QLoRAError("no").report() == "QLoRAError: no"


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("training", "learningrate", "training.learning_rate"),
        ("training", "r", "lora.r"),  # the right name in the wrong section
        ("lora", "dtype", "model.dtype"),
        ("lora", "rank", "lora.r"),  # what others call it
        ("model", "base_model", "model.model_name_or_path"),
        ("training", "lr", "training.learning_rate"),
        ("quantization", "learning_rte", "training.learning_rate"),  # misspelt and in the wrong section
        ("data", "lora", "lora"),  # indented by mistake
    ],
)
def test_an_unknown_key_is_answered_with_the_key_that_was_meant(section, key, meant):
    text, line = with_knob(f"{section}.{key}", "1")
    said = f"r.yaml:{line}: unknown key `{section}.{key}`\n  did you mean `{meant}`?"
    assert complaints(text, base="") == [said]


def test_a_key_unlike_any_other_gets_no_suggestion():
    assert complaints("zzzz: 1") == ["r.yaml:3: unknown key `zzzz`"]


def test_a_dotted_key_is_answered_with_how_to_nest_it():
    assert complaints("training.seed: 1") == [
        "r.yaml:3: unknown key `training.seed`\n  nest it: `seed` under `training:`"
    ]


def test_a_misspelt_key_is_not_also_reported_as_missing():
    text = "modle: {}\ndata:\n  dataset: [{path: a}]\n"
    assert [c.split("\n")[0] for c in complaints(text, base="")] == [
        "r.yaml:1: unknown key `modle`",
        "r.yaml:3: unknown key `data.dataset`",
    ]


def test_a_row_of_datasets_is_answered_from_its_own_keys():
    text, _ = with_knob("data.eval_datasets", "[{path: b, type: alpaca}]")
    assert complaints(text, base="") == [
        "r.yaml:5: unknown key `data.eval_datasets.0.type`\n  did you mean `data.eval_datasets.0.format`?"
    ]


def test_what_needs_no_knob_says_so_instead_of_suggesting_another():
    (text,) = complaints("training: {gradient_checkpointing: true}")
    assert "leave it out" in text and "did you mean" not in text


def test_every_name_from_elsewhere_leads_to_a_knob_and_hides_none():
    known = {key: key.rpartition(".")[2] for key, _ in fields_of(Config)}
    assert set(RENAMED.values()) <= known.keys()
    assert set(RENAMED_IN_ROW.values()) <= DatasetConfig.model_fields.keys()
    names = {leaf for key, leaf in known.items() if "[]" not in key}
    assert names.isdisjoint(RENAMED) and names.isdisjoint(NEEDLESS)


@pytest.mark.parametrize(
    ("knob", "said"),
    [
        (
            "data.packing: no",
            "`data.packing` expects true or false, got the text `no`\n  write `false`, without quotes",
        ),
        ("training.max_steps: 1e3", "`training.max_steps` expects a whole number, got `1e3`\n  write `1000`"),
        (
            "training.save_steps: 1_000",
            "`training.save_steps` expects a whole number or null, got the text `1_000`\n"
            "  write `1000`, without quotes",
        ),
        ("training.seed: true", "`training.seed` expects a whole number, got `true`"),
        ("training.seed: ", "`training.seed` expects a whole number, got nothing"),
        ("training.learning_rate: fast", "`training.learning_rate` expects a number, got the text `fast`"),
        ("training.learning_rate: [1]", "`training.learning_rate` expects a number, got a list"),
        ("training.learning_rate: .nan", "`training.learning_rate` must be finite, got `.nan`"),
        ("training.learning_rate: 0", "`training.learning_rate` must be more than 0, got `0`"),
        ("training.seed: 99999999999", "`training.seed` must be at most 4294967295, got `99999999999`"),
        ("lora.lora_dropout: 1", "`lora.lora_dropout` must be less than 1, got `1`"),
        ("lora.r: x", "`lora.r` expects a whole number, got the text `x`"),
        ("model.revision: 7e12", '`model.revision` expects text or null, got `7e12`\n  put it in quotes: "7e12"'),
        (
            "lora.modules_to_save: lm_head",
            "`lora.modules_to_save` expects a list of text or null, got the text `lm_head`\n  write `[lm_head]`",
        ),
        (
            "lora.layers_to_transform: [1, -1]",
            "`lora.layers_to_transform.1` must be at least 0, got `-1`",
        ),
        ("lora.rank_pattern: {q_proj: 0}", "`lora.rank_pattern.q_proj` must be at least 1, got `0`"),
        (
            "quantization.bnb_4bit_quant_type: NF4",
            "`quantization.bnb_4bit_quant_type` expects `nf4` or `fp4`, got the text `NF4`\n  did you mean `nf4`?",
        ),
        ("training.output_dir: ''", "`training.output_dir` must not be empty"),
        (
            "lora.init_lora_weights: eva",  # reads rows of the data set first, which no recipe here can ask for
            "`lora.init_lora_weights` expects true or false or `gaussian`, `mica`, `olora`, `orthogonal` or `pissa` "
            "or text like `pissa_niter_16`, got the text `eva`",
        ),
        ("training.adam_beta1: !!int foo", "`foo` cannot be read as `!!int`"),
        ("training.adam_beta1: !x 1", "unknown tag `!x`"),
        (
            "training.output_dir: " + "x" * 60 + ": y",
            "a `:` where no key can be\n  check the indentation here and above; text with `: ` inside needs quotes",
        ),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(knob, said):
    key, _, value = knob.partition(": ")
    text, line = with_knob(key, value)
    assert complaints(text, base="") == [f"r.yaml:{line}: {said}"]


def test_a_section_that_is_not_one_is_said_to_be():
    assert complaints("memory: 3") == ["r.yaml:3: `memory` expects a section, got `3`"]


def test_datasets_that_are_not_a_list_are_answered_with_how_to_start_one():
    (text,) = complaints("model: {model_name_or_path: b}\ndata:\n  datasets:\n    path: a\n", base="")
    assert text == "r.yaml:3: `data.datasets` expects a list of sections, got a mapping\n  start each entry with `- `"


# --- values that do not go together


@pytest.mark.parametrize(
    ("more", "line", "key"),
    [
        ("method: qlora\nquantization:\n  load_in_4bit: false", 5, "quantization.load_in_4bit"),
        ("training:\n  warmup_ratio: 0.1\n  warmup_steps: 5", 5, "training.warmup_steps"),
        ("training:\n  lr_scheduler_type: constant\n  warmup_steps: 5", 5, "training.warmup_steps"),
        ("training:\n  lr_scheduler_type: constant\n  warmup_ratio: 0.1", 5, "training.warmup_ratio"),
        ("training:\n  max_steps: 0", 4, "training.max_steps"),
        ("training:\n  eval_steps: 5", 4, "training.eval_steps"),
        ("training:\n  predict_with_generate: true", 4, "training.predict_with_generate"),
        ("lora:\n  target_modules: []", 4, "lora.target_modules"),
        ("lora:\n  layers_to_transform: [0]", 4, "lora.layers_to_transform"),
        ("lora:\n  target_modules: [q]\n  layers_pattern: h", 5, "lora.layers_pattern"),
        ("lora:\n  target_parameters: [experts.w]\n  lora_dropout: 0.1", 5, "lora.lora_dropout"),
        ("lora:\n  target_parameters: [experts.w]\n  use_dora: true", 5, "lora.use_dora"),
    ],
)
def test_a_contradiction_is_reported_at_the_key_that_makes_it(more, line, key):
    with pytest.raises(RecipeError) as caught:
        config(more)
    assert [(problem.line, problem.key) for problem in caught.value.problems] == [(line, key)]


HELD_OUT = """\
model: {{model_name_or_path: b}}
data:
  datasets: [{{path: hub/a, name: c{train}}}]
  eval_datasets: [{{path: hub/a, name: {name}{held_out}}}]
"""


@pytest.mark.parametrize(
    ("train", "name", "held_out"),
    [("", "c", ""), (", split: test", "c", ", split: test"), ("", "c", ", split: 'train[90%:]'")],
)
def test_rows_that_are_trained_on_are_not_held_out(train, name, held_out):
    (text,) = complaints(HELD_OUT.format(train=train, name=name, held_out=held_out), base="")
    assert text.startswith("r.yaml:4: `data.eval_datasets.0` holds out rows of `data.datasets.0`")


@pytest.mark.parametrize(
    ("train", "name", "held_out"),
    [("", "d", ""), ("", "c", ", split: test"), (", split: 'train[:90%]'", "c", ", split: 'train[90%:]'")],
)
def test_other_rows_of_the_same_source_can_be_held_out(train, name, held_out):
    assert parse_recipe(HELD_OUT.format(train=train, name=name, held_out=held_out)).data.eval_datasets


def test_held_out_rows_are_named_in_one_way_and_have_no_weight():
    text = """\
model: {model_name_or_path: b}
data:
  datasets: [{path: a}]
  eval_fraction: 0.1
  eval_datasets:
    - path: b
      weight: 2
"""
    assert [c.split(":")[1] for c in complaints(text, base="")] == ["4", "7"]


def test_contradictions_of_one_section_are_told_together_with_typos_of_another():
    assert len(complaints("training: {max_steps: 0}\nlora: {rr: 1}")) == 2


# --- text that is not a recipe


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "empty"),
        ("# only a comment\n", 1, "empty"),
        ("- a\n- b\n", 1, "a list"),
        ("just words", 1, "just words"),
        ("model:\n\tdtype: float16\n", 2, "tab"),
        ("lora:\n  r: 1\n   r: 2\n", 3, "indentation"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a: 1\nb: 'x\n", 3, "never closed"),
        ("a: 1\n---\nb: 1\n", 2, "second document"),
        ("a: 1\nb: *nowhere\n", 2, "nowhere"),
        ("a: 1\nb: @x\n", 2, "quotes"),
        ("a: 1\nb: \x07\n", 2, "U+0007"),
        ('a: 1\nb: "\\U00110000"\n', 2, "not valid YAML"),
        ("a: 1\n[b]: 1\n", 2, "key must be text"),
        ("a: &x\n  b: *x\n", 1, "32 levels"),
        ("a: " + "[" * 500, 1, "32 deep"),
        ("x: &x0 [1, 1]\n" + "".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 30)), 1, "10000 values"),
    ],
)
def test_text_that_is_not_a_recipe_is_refused_at_its_line(text, line, said):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert any(problem.line == line and said in str(problem) for problem in caught.value.problems), caught.value


def test_a_key_written_twice_is_one_problem_wherever_it_is_nested():
    assert complaints("lora: {r: 1}\nlora: {r: 2}") == [
        "r.yaml:4: duplicate key `lora`, first set on line 3\n  keep one of them"
    ]
    assert complaints("lora:\n  rank_pattern:\n    q: 1\n    'q': 1") == [
        "r.yaml:6: duplicate key `lora.rank_pattern.q`, first set on line 5\n  keep one of them"
    ]


def test_a_merge_key_is_refused_and_explained():
    assert complaints("lora:\n  <<: {r: 8}") == [
        "r.yaml:4: unknown key `lora.<<`\n  YAML 1.2 has no merge keys: write the keys out"
    ]


# --- files that cannot be read


def refused(path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value).replace(str(path), "PATH").replace(str(path.parent), "DIR").replace("\\", "/")


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path):
    (tmp_path / "smollm2.yaml").touch()
    (tmp_path / "unlike.txt").touch()
    assert refused(tmp_path / "smolm2.yml") == "PATH: no such file\n  did you mean `DIR/smollm2.yaml`?"
    assert refused(tmp_path / "zzz") == "PATH: no such file"
    assert refused(tmp_path / "nowhere" / "r.yaml") == "PATH: no such file\n  there is no directory `DIR`"


def test_a_directory_is_answered_with_the_recipes_in_it(tmp_path):
    (tmp_path / "b.yaml").touch()
    (tmp_path / "a.yml").touch()
    assert refused(tmp_path) == "PATH: is a directory, not a recipe\n  it holds `a.yml` and `b.yaml`"


def test_a_file_that_is_not_utf_8_is_refused_at_the_line_of_the_byte(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(MINIMAL.encode() + b"# caf\xe9\n")
    assert refused(path) == "PATH:3: not UTF-8 text: byte 0xe9\n  save the file as UTF-8"


def test_a_dataset_given_as_the_recipe_is_not_parsed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "row"}\n' * 50_000)
    assert refused(path) == "PATH: is over 256 KiB, too large for a recipe\n  is it the dataset?"


def test_a_path_that_no_file_can_have_is_an_error_of_the_recipe(tmp_path):
    assert "PATH: cannot be read" in refused(tmp_path / "a\0b")


# --- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
        ("method=full", "method", "full"),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ["q_proj", "v_proj"]),
        ("lora.rank_pattern={model.layers.0: 4}", "lora.rank_pattern", {"model.layers.0": 4}),
        ("model.revision=", "model.revision", None),
        ("model.revision=no", "model.revision", "no"),
        ("model.revision=a=b", "model.revision", "a=b"),
        ("data.datasets.0.path=other.jsonl", "data.datasets", [DatasetConfig(path="other.jsonl")]),
        (
            "data.datasets.1.path=more.jsonl",
            "data.datasets",
            [DatasetConfig(path="rows.jsonl"), DatasetConfig(path="more.jsonl")],
        ),
        ("data.eval_datasets.0.path=held.jsonl", "data.eval_datasets", [DatasetConfig(path="held.jsonl")]),
    ],
)
def test_an_override_replaces_or_adds_a_value(override, key, value):
    got: Any = config("", override)
    for part in key.split("."):
        got = getattr(got, part)
    assert got == value


def test_the_last_override_wins():
    assert config("lora: {r: 4}", "lora.r=8", "lora.r=32").lora.r == 32
    assert config("", "lora={r: 4, use_dora: true}", "lora.r=8").lora == LoraSection(r=8, use_dora=True)


def test_an_override_mends_what_is_wrong_in_the_file():
    assert config("lora: {r: none}", "lora.r=8").lora.r == 8


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "training.lerning_rate=1e-4",
            "--set training.lerning_rate: unknown key `training.lerning_rate`\n"
            "  did you mean `training.learning_rate`?",
        ),
        ("trainig.seed=1", "--set trainig.seed: unknown key `trainig`\n  did you mean `training`?"),
        ("lora.r=x", "--set lora.r: `lora.r` expects a whole number, got the text `x`"),
        ("lora.r", "--set lora.r: expected key=value\n  e.g. `--set training.learning_rate=1e-4`"),
        ("=1", "--set : expected key=value\n  e.g. `--set training.learning_rate=1e-4`"),
        ("lora..r=1", "--set lora..r: expected key=value\n  e.g. `--set training.learning_rate=1e-4`"),
        ("lora.r=[", "--set lora.r: not valid YAML: a bracket or a quote is never closed"),
        ("lora={r: 1, r: 2}", "--set lora: duplicate key `r`\n  keep one of them"),
        (
            "data.datasets.5.path=x",
            "--set data.datasets.5.path: `data.datasets` has 1 entry, counted from 0: "
            "`5` is none of them, nor the next",
        ),
        ("method.x=1", "--set method.x: `method` has nothing inside it: it is the text `lora`"),
        (
            "data.datasets.0.weight=-1",
            "--set data.datasets.0.weight: `data.datasets.0.weight` must be more than 0, got `-1`",
        ),
    ],
)
def test_a_bad_override_is_reported_as_what_was_typed(override, said):
    assert complaints("method: lora", override) == [said]


def test_what_an_override_leaves_out_is_missing_from_the_override():
    (text,) = complaints("", "data.datasets=[{weight: 1}]")
    assert text.startswith("--set data.datasets: missing `data.datasets.0.path`")


def test_problems_of_overrides_follow_those_of_the_file():
    where = [text.split(": ")[0] for text in complaints("lora: {rr: 1}", "method=x", "lora.q=1")]
    assert where[0] == "r.yaml:3" and set(where[1:]) == {"--set method", "--set lora.q"}


# --- back to text


def test_a_dumped_recipe_says_only_what_is_not_a_default():
    assert dump_recipe(config("training: {seed: 42, learning_rate: 1e-5}")) == (
        "model:\n  model_name_or_path: base\n"
        "data:\n  datasets:\n  - path: rows.jsonl\n"
        "training:\n  learning_rate: 1.0e-05\n"
    )


def test_a_chat_template_is_dumped_as_it_reads():
    template = "{% for m in messages %}\n{{ m.content }}\n{% endfor %}\n"
    dumped = dump_recipe(config("", "data.chat_template=" + json.dumps(template)))
    assert "  chat_template: |\n    {% for m in messages %}\n    {{ m.content }}\n    {% endfor %}\n" in dumped


# --- every recipe there is

WORDS = ["no", "1e-5", "null", "~", "", "010", "0o7", "1_0", "2024-01-01", "<<", "=", "- a", "a: b", "#"]
SPACES = [" x ", "x\n y\n", "\n", "\n x", "x \n", "\x85", "\ufeff", "\0", "'\"", "{{ x }}\n\n"]
texts = st.sampled_from(WORDS + SPACES) | st.text(max_size=12)


def values_of(annotation: Any, limits: dict[str, Any]) -> st.SearchStrategy:
    """Values that an annotation of config.py admits, read off the annotation itself."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        info = next(meta for meta in args[1:] if isinstance(meta, FieldInfo))
        return st.sampled_from(info.examples) if info.examples else values_of(args[0], limits_of(info))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        size = {"min_size": limits.get("min_length", 0), "max_size": 2}
        return st.lists(values_of(args[0], {}), **size)
    if origin is dict:
        return st.dictionaries(texts, values_of(args[1], {}), max_size=2)
    if args:  # a union
        return st.one_of([values_of(arg, limits) for arg in args])
    if annotation is str:
        return texts.filter(lambda text: len(text) >= limits.get("min_length", 0))
    if annotation is int:
        return st.integers(limits.get("ge", 0), limits.get("le", 2**40))
    if annotation is float:
        low, high = limits.get("ge", limits.get("gt", 0)), limits.get("lt", 1e300)
        return st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits)
    if annotation is bool:
        return st.booleans()
    if annotation is type(None):
        return st.none()
    fields = {
        name: (field.is_required(), values_of(field.annotation, limits_of(field)))
        for name, field in annotation.model_fields.items()
    }
    return st.fixed_dictionaries(
        {name: values for name, (required, values) in fields.items() if required},
        optional={name: values for name, (required, values) in fields.items() if not required},
    )


def limits_of(field: FieldInfo) -> dict[str, Any]:
    names = ("ge", "gt", "le", "lt", "min_length")
    return {name: getattr(meta, name) for meta in field.metadata for name in names if hasattr(meta, name)}


# Each knob's value alone is valid; a set of them may hold a contradiction, and then is no Config to be dumped.
recipes = values_of(Config, {})
quick = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    values = draw(recipes)
    lora = values.get("lora", {})
    lora.pop("target_parameters", None)
    if isinstance(lora.get("target_modules", "all-linear"), str):
        lora.pop("layers_to_transform", None)
    if lora.get("layers_to_transform") is None:
        lora.pop("layers_pattern", None)
    values["data"].pop("eval_datasets" if draw(st.booleans()) else "eval_fraction", None)
    for held_out in values["data"].get("eval_datasets", []):
        held_out.pop("weight", None)
        held_out["split"] = "held out"
    values.get("training", {}).pop("warmup_steps" if draw(st.booleans()) else "warmup_ratio", None)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        assert all(each["type"] == "value_error" for each in error.errors()), error  # only contradictions are left
        assume(False)
        raise


@given(configs())
@quick
def test_a_dumped_config_loads_equal(want):
    assert parse_recipe(dump_recipe(want)) == want
    assert Config.model_validate(want.model_dump()) == want
    assert parse_recipe(json.dumps(want.model_dump())) == want


def is_config_or_recipe_error(text: str, *overrides: str) -> None:
    try:
        parse_recipe(text, "r.yaml", overrides)
    except RecipeError as error:
        assert error.problems
        last = len(re.split("\r\n|[\r\n\x85\u2028\u2029]", text))  # line breaks of YAML 1.1, which PyYAML counts
        for problem in error.problems:
            assert problem.line is None or 1 <= problem.line <= last
            assert problem.message and len(str(problem).encode().splitlines()) <= 2  # printable, and no dump
            assert not re.search(
                r"pydantic|Input should|\bdict\b|\bstr\b|\bint_|NoneType", problem.message + problem.hint
            )


names = st.sampled_from(sorted({part for key, _ in fields_of(Config) for part in re.split(r"\W+", key) if part}))
MARKS = [
    *"\n\n\n    :::---[]{},&*!?|>'\"%@`#~\t",
    ": ",
    "\n  ",
    "\n- ",
    "&a ",
    "*a",
    "!!int ",
    "!!x ",
    "---\n",
    "\\ud800",
]
scraps = st.sampled_from(MARKS)


@given(st.text() | st.lists(names | scraps | texts, max_size=40).map("".join))
@quick
def test_any_text_is_a_config_or_a_recipe_error(text):
    is_config_or_recipe_error(text)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | texts, inner, max_size=3),
    max_leaves=8,
)
sections = st.fixed_dictionaries(
    {}, optional={name: st.dictionaries(names, anything, max_size=4) | anything for name in Config.model_fields}
)


@given(sections)
@quick
def test_any_values_at_any_knobs_are_a_config_or_a_recipe_error(values):
    is_config_or_recipe_error(json.dumps(values))


@given(st.text() | st.lists(names | st.sampled_from([*"..0=[]{}: "]) | texts, max_size=8).map("".join))
@quick
def test_any_override_is_a_config_or_a_recipe_error(override):
    is_config_or_recipe_error(MINIMAL, override)
    is_config_or_recipe_error(MINIMAL, f"data.datasets.{override}", "lora." + override)


@given(st.binary(max_size=60))
@settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_config_or_a_recipe_error(tmp_path, raw):
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    with pytest.raises(RecipeError):  # sixty bytes do not hold the two required keys
        load_recipe(path)


# --- what is made from the definition


def test_every_knob_says_what_it_means():
    for key, field in fields_of(Config):
        assert (field.description or "").endswith((".", "...")), key


def test_the_schema_describes_every_knob_and_admits_the_shorthands():
    schema = Config.model_json_schema()
    training = schema["$defs"]["TrainingConfig"]["properties"]
    assert "adamw" in json.dumps(training["optim"]) and "none" in json.dumps(training["report_to"])
    for definition in [schema, *schema["$defs"].values()]:
        assert definition["additionalProperties"] is False
        assert all("description" in field for field in definition["properties"].values())


def test_the_table_of_knobs_has_each_knob_once_with_its_default():
    table = {row.key: row for row in knobs()}
    assert len(table) == len(list(knobs()))
    assert table["model.model_name_or_path"].default == "required"
    assert table["training.learning_rate"][1:3] == ("number", "0.0002")
    assert table["lora.target_modules"][1:3] == ("text or list of text", "all-linear")
    assert table["training.eval_steps"][1:3] == ("whole number or null", "null")
    assert "data.datasets[].format" in table and "data.eval_datasets" in table and "training" not in table


def test_defaults_are_valid_values():
    assert Config.model_validate(config().model_dump()) == config()


def test_names_are_upstreams():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from accelerate.utils import LoggerType

    lora = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert LoraSection.model_fields.keys() - lora == {"autocast_adapter_dtype"}
    assert "autocast_adapter_dtype" in inspect.signature(peft.get_peft_model).parameters
    training = {field.name for field in dataclasses.fields(transformers.Seq2SeqTrainingArguments)}
    # transformers 5 folded warmup_ratio into warmup_steps; recipes keep the name that everyone knows
    assert TrainingConfig.model_fields.keys() - training <= {"warmup_ratio"}
    assert (
        QuantizationConfig.model_fields.keys() <= inspect.signature(transformers.BitsAndBytesConfig).parameters.keys()
    )
    trackers = get_args(get_args(TrainingConfig.model_fields["report_to"].annotation)[0])
    assert set(trackers) <= {str(each.value) for each in LoggerType} - {"all"}


@pytest.mark.parametrize("how", ["gaussian", "mica", "olora", "orthogonal", "pissa", "pissa_niter_2"])
def test_each_way_to_start_an_adapter_is_one_that_peft_can_do_from_a_recipe_alone(how):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    section = LoraSection(r=2, target_modules=["0"], init_lora_weights=how)
    peft.get_peft_model(model, peft.LoraConfig(**section.model_dump(exclude={"autocast_adapter_dtype"})))


def test_reading_a_recipe_imports_nothing_heavy():
    code = "import sys, qlora.recipe; print(*{'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""
