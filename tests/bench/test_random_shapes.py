"""Shapes are found by their names, by what people call them, and by path; their weights are the same whoever asks."""

import json

import pytest
import torch

from qlora.bench.shapes import DrawnTensor, known, random_source, shape_of
from qlora.errors import ModelError


@pytest.mark.parametrize("name", known())
def test_each_shape_is_one_that_transformers_can_read(name, tmp_path):
    config = random_source(name, tmp_path, torch.device("cpu"), 0).config()
    assert config.model_type == shape_of(name)["model_type"]


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("llama3.1-8b", "llama3.1-8b"),
        ("llama-8b", "llama3.1-8b"),
        ("Llama-3-8B", "llama3.1-8b"),
        ("llama3.1", "llama3.1-8b"),
        ("qwen-14b", "qwen3-14b"),
        ("qwen-30b", "qwen3-30b-a3b"),
        ("mixtral", "mixtral-8x7b"),
        ("mid", "mid"),
        ("sma", "small"),
    ],
)
def test_a_shape_is_found_by_what_people_call_it(called, name):
    assert name in known() and shape_of(called) == shape_of(name)


@pytest.mark.parametrize("called", ["llama-9b", "llama2-8b", "mistral-7b", "8b", "qwen-3b", "gpt"])
def test_an_unknown_shape_is_refused_with_the_list_of_shapes(called):
    with pytest.raises(ModelError) as refused:
        shape_of(called)
    assert called in str(refused.value) and all(name in str(refused.value) for name in known())


def test_what_fits_several_shapes_is_refused_with_those():
    with pytest.raises(ModelError, match=r"llama: fits 4 shapes\n.* llama3\.1-8b, llama3\.2-1b"):
        shape_of("llama")


def test_a_path_is_a_shape_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    assert shape_of(str(tmp_path)) == shape_of(str(tmp_path / "config.json"))
    assert shape_of(str(tmp_path))["hidden_size"] == 64


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "No such file"), ("{", "is no JSON"), ("[]", "no `model_type`"), ("{}", "no `model_type`")],
)
def test_a_file_that_is_no_shape_says_so(text, said, tmp_path):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ModelError, match=said) as refused:
        shape_of(str(path))
    assert str(path) in str(refused.value)


def test_a_weight_is_drawn_the_same_each_time_and_follows_from_its_name_and_the_seed():
    def drawn(name, seed=0):
        return DrawnTensor(name, torch.Size((64, 32)), torch.float32, torch.device("cpu"), seed)[...]

    assert drawn("a.weight").equal(drawn("a.weight"))
    assert not drawn("a.weight").equal(drawn("b.weight")) and not drawn("a.weight").equal(drawn("a.weight", 1))
    assert drawn("a.weight").std() == pytest.approx(0.02, rel=0.1)  # of 2048 values: 6 sigma
    assert DrawnTensor("n.weight", torch.Size((4,)), torch.float32, torch.device("cpu"), 0)[...].tolist() == [1] * 4
    assert DrawnTensor("n.bias", torch.Size((4,)), torch.float32, torch.device("cpu"), 0)[...].tolist() == [0] * 4


def test_two_ways_of_drawing_never_share_a_directory(tmp_path):
    cpu = torch.device("cpu")
    directories = {random_source("small", tmp_path, cpu, seed).directory for seed in (0, 1)}
    assert len(directories) == 2 and random_source("small", tmp_path, cpu, 0).directory in directories
