"""The committed shapes are those of the models whose names they bear."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.config import ModelConfig
from qlora.model.source import config_of

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
PARAMETERS = {  # as their makers give them; of Gemma-3-27B without its eye, which has 0.4e9
    "gemma3-27b": 27.0e9,
    "llama3.1-8b": 8.03e9,
    "llama3.2-1b": 1.24e9,
    "llama3.2-3b": 3.21e9,
    "llama3.3-70b": 70.6e9,
    "mixtral-8x7b": 46.7e9,
    "qwen3-14b": 14.8e9,
    "qwen3-30b-a3b": 30.5e9,
    "qwen3-32b": 32.8e9,
    "mid": 327.2e6,  # these two are ours, for two CPU cores
    "small": 22.03e6,
}


def config(shape: str, **changes):
    return AutoConfig.for_model(**json.loads((SHAPES / f"{shape}.json").read_text()) | changes)


def test_every_shape_is_counted():
    assert PARAMETERS.keys() == {path.stem for path in SHAPES.glob("*.json")}


@pytest.mark.parametrize("shape", PARAMETERS)
def test_a_shape_has_its_models_parameters(shape):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config_of(ModelConfig(model_name_or_path=str(SHAPES / f"{shape}.json")))
        )
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == pytest.approx(PARAMETERS[shape], rel=5e-3)  # the makers' figures are rounded to three digits


@pytest.mark.parametrize("shape", PARAMETERS)
def test_a_shape_says_nothing_that_transformers_does_not_know(shape):
    """A misspelt key would be kept and have no effect."""
    read = config(shape)
    known = set(type(read)().to_dict()) | set(read.attribute_map) | {"architectures", "sliding_window_pattern"}
    # Read where they are there, or written by the makers and of no meaning without a sliding window.
    known |= {"head_dim", "max_window_layers"}
    assert json.loads((SHAPES / f"{shape}.json").read_text()).keys() <= known


def test_gemma_attends_to_everything_in_each_sixth_layer_alone():
    for layers in (62, 12):  # `--layers` cuts a shape
        types = config("gemma3-27b", num_hidden_layers=layers).layer_types
        assert [i for i, kind in enumerate(types) if kind == "full_attention"] == list(range(5, layers, 6))
    rope = config("gemma3-27b").rope_parameters
    assert rope["full_attention"] == {"factor": 8.0, "rope_theta": 1e6, "rope_type": "linear"}
    assert rope["sliding_attention"] == {"rope_theta": 1e4, "rope_type": "default"}
