"""Layers whose inner activations are kept run once, give the same bits, and hold activations only: no weight."""

import contextlib
import gc
import weakref
from contextlib import contextmanager
from itertools import pairwise
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora.config import MemoryConfig
from qlora.errors import ModelError
from qlora.model import residency
from qlora.model.adapters import attach, trainable
from qlora.model.blocks import Blocks, cut
from qlora.model.kept import without_weights
from qlora.model.load import load_base
from qlora.model.nf4 import FourBit, four_bit_weights, quantize_
from qlora.model.residency import Residency
from qlora.model.source import open_source
from qlora.train.step import LayerMajor, choose
from tests.conftest import ARCHITECTURES, random_batch, tiny_config
from tests.train.test_step import TwiceThrough
from tests.train.test_tiers import LAYERS, outcome, same, step_of

CPU = torch.device("cpu")
__all__ = ["step_of"]

HOST = {"layers_on_device": 0}
FILE = {"layers_on_device": 0, "layers_on_host": 0}


@pytest.fixture
def one_buffer(monkeypatch):
    """All dense weights stand in one buffer, which the next layer overwrites, as on a GPU."""
    buffers = Residency._buffers

    def as_on_a_gpu(self, i):
        with monkeypatch.context() as patch:
            patch.setattr(residency, "HOST", torch.device("meta"))
            return buffers(self, i)

    monkeypatch.setattr(Residency, "_buffers", as_on_a_gpu)


@pytest.mark.parametrize("k, kept", [(1, 2), (3, 1), (2, 99)])
@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"activations": "host"},
        {"activations": "file"},
        {"adapters": "host"},
        HOST | {"activations": "host", "adapters": "host"},
        FILE | {"activations": "file"},
    ],
    ids=str,
)
def test_losses_and_gradients_are_bit_equal_to_those_of_the_recompute(memory, k, kept, step_of, one_buffer):
    lora = {"lora_dropout": 0.3}
    expected = outcome(step_of("llama", lora), k)
    assert len(expected[0][1]) > LAYERS and any(grad.abs().max() > 0 for grad in expected[0][1].values())
    assert same(outcome(step_of("llama", lora, layers_kept=kept, **memory), k), expected)


# Of the stacked experts, and of a base that PEFT's own forward reads, autograd saves views of the dense weight.
VIEWS = {
    "mixtral": ("mixtral", {}),
    "DoRA": ("llama", {"use_dora": True, "lora_dropout": 0.3}),
    "trained norms": ("llama", {"modules_to_save": ["post_attention_layernorm"]}),
    "two layers alone": ("llama", {"layers_to_transform": [1, 4], "target_modules": ["q_proj"]}),
    "windows": ("gemma3_text", {"lora_dropout": 0.3}),
}


@pytest.mark.parametrize("case", VIEWS)
def test_whatever_a_layer_saves_of_its_weights_gives_the_same_bits(case, step_of, one_buffer):
    expected = outcome(step_of(*VIEWS[case]))
    assert expected[0][1]
    assert same(outcome(step_of(*VIEWS[case], layers_kept=99, adapters="host", **HOST)), expected)


MODELS = [(architecture, "qlora", "float32") for architecture in ARCHITECTURES] + [
    (architecture, method, "bfloat16") for architecture in ("llama", "mixtral") for method in ("qlora", "lora", "full")
]


@pytest.mark.parametrize("architecture, method, dtype", MODELS)
def test_every_architecture_gives_the_same_bits(architecture, method, dtype, checkpoint, recipe):
    config = recipe(checkpoint(architecture), method, model={"dtype": dtype})
    model = load_base(config, open_source(config.model), CPU).model
    adapted = (attach(model, config.lora, seed=0) if method != "full" else model).train()
    blocks = cut(model)

    def step(kept):
        memory = MemoryConfig(micro_batch_tokens=0, layers_kept=kept)
        return adapted, LayerMajor(blocks, Residency(blocks.layers, CPU), memory)

    expected = outcome(step(0))
    assert len(expected[0][1]) == len(trainable(adapted))
    assert same(outcome(step(2)), expected)


@pytest.mark.parametrize("kept", [0, 1, 3, LAYERS])
def test_a_kept_layer_runs_once_and_the_others_twice(kept, step_of, monkeypatch):
    _, step = step_of(layers_kept=kept)
    runs, layer = [], Blocks.layer
    monkeypatch.setattr(Blocks, "layer", lambda self, i, *a, **kw: runs.append(i) or layer(self, i, *a, **kw))
    step([random_batch(seed=j) for j in range(2)])
    once = min(kept, LAYERS - 1) + 1
    assert [runs.count(i) // 2 for i in range(LAYERS)] == [2] * (LAYERS - once) + [1] * once
    assert step.residency.visits == 2 * LAYERS - 1


class Stacked(nn.Module):
    """Reads a four-bit weight and a trained one in slices, rows first and columns first."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.frozen = nn.Parameter(torch.empty(4, 64, 64, device="meta"), requires_grad=False)
        quantize_(self, "frozen", torch.randn(4, 64, 64, generator=g) / 8, FourBit(compute_dtype=torch.float32))
        self.trained = nn.Parameter(torch.randn(8, 64, generator=g) / 8)

    def forward(self, x):
        for slice in (2, 1):
            x = torch.tanh(F.linear(x, self.frozen[slice]) @ self.frozen[3])
        return x + F.linear(F.linear(x, self.trained[2:4]), self.trained[4:6].t())


def test_a_view_of_a_weight_is_found_again_wherever_the_weight_is_at_the_backward():
    layer, g = Stacked(), torch.Generator().manual_seed(1)
    (weight,), x = four_bit_weights(layer), torch.randn(5, 64, generator=g, requires_grad=True)
    layer(x).square().sum().backward()
    expected, x.grad, layer.trained.grad = (x.grad, layer.trained.grad), None, None
    buffers = [torch.empty(5 * 64 * 64)[start:][: 4 * 64 * 64].view(4, 64, 64) for start in (7, 70)]
    with weight.standing(buffers[0]), without_weights(layer):
        y = layer(x).square().sum()
    before, layer.trained.data = layer.trained.data, layer.trained.data.clone()
    for gone in (before, buffers[0]):
        gone.fill_(torch.nan)
    with weight.standing(buffers[1]):
        y.backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(layer.trained.grad, expected[1])


class Alive(TorchDispatchMode):
    """Bytes of the storages that are made inside, while they live."""

    def __init__(self, known):
        super().__init__()
        self.nbytes, self._known = 0, WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            if storage not in self._known:
                self._known.add(storage)
                self.nbytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, nbytes):
        self.nbytes -= nbytes


@pytest.fixture
def watched(monkeypatch):
    """watched(step, k) -> the bytes alive as each visit of a step begins.

    It also sees to it that what stands in a visit, dense or trained, is gone after it.
    """

    def watch(step, k=2):
        batches, route, held = [random_batch(2, 40, seed=j) for j in range(k)], LayerMajor._route, []
        step(batches)  # what a first step leaves behind
        parameters = list(step.blocks.model.parameters())
        resident = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        resident += [part for weight in four_bit_weights(step.blocks.model) for part in (weight.held or {}).values()]
        alive = Alive(resident)

        @contextmanager
        def inside(layer, visit):
            with visit:
                standing = [weight.dense() for weight in four_bit_weights(layer)]
                standing += [p.detach() for p in layer.parameters() if p.requires_grad]
                storages = [each.untyped_storage() for each in standing]
                refs = [weakref.ref(storage) for storage in storages if storage not in resident_storages]
                del standing, storages
                yield
            assert not any(ref() for ref in refs), "a weight is held beyond its visit"

        def watched_route(step, order):
            for i, visit in zip(order, route(step, order), strict=True):
                held.append(alive.nbytes)
                yield inside(step.blocks.layers[i], visit)

        resident_storages = {tensor.untyped_storage() for tensor in resident}
        with monkeypatch.context() as patch, alive:
            patch.setattr(LayerMajor, "_route", watched_route)
            step(batches)
        return held

    return watch


@pytest.mark.parametrize("adapters", ["device", "host"])
@pytest.mark.parametrize("case", VIEWS)
def test_no_weight_is_held_between_visits_and_activations_go_layer_by_layer(case, adapters, step_of, watched):
    held = watched(step_of(*VIEWS[case], layers_kept=3, adapters=adapters)[1])
    up, down = held[:LAYERS], held[LAYERS - 1 :][::-1]
    boundary = 2 * 2 * 40 * 64 * 4  # k x B x T x H in fp32
    assert up[1] - up[0] == boundary
    assert all(after - before > 4 * boundary for before, after in pairwise(up[1:]))
    assert all(above - below > 4 * boundary for below, above in pairwise(down[1:-1])), "freed later than its layer"
    assert down[0] < up[0] + 1.1 * boundary  # the slope of the lowest layer's output, and small change


def test_twice_the_micro_batches_keep_twice_as_much_in_every_layer(step_of, watched):
    """So what is held is activations alone: a weight would not come twice."""
    grown = {}
    for k in (2, 4):
        (grown[k],) = {after - before for before, after in pairwise(watched(step_of(layers_kept=3)[1], k)[1:LAYERS])}
    assert grown[4] == 2 * grown[2]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_in_the_middle_lets_go_of_all_that_was_kept(where, step_of, monkeypatch):
    made = _, step = step_of(layers_kept=3, activations="host")
    expected, kept, keep = outcome(step_of()), [], LayerMajor._keep

    def fails(self, i, *args):
        if where == "forward" and i == 3:
            raise torch.OutOfMemoryError("full")
        result = keep(self, i, *args)
        kept.extend(weakref.ref(tensor) for tensor in result)
        return result

    def loss_fails(self, *args, **kwargs):
        raise torch.OutOfMemoryError("full")

    gc.disable()  # what only a collection finds would stand while the step is taken again
    try:
        with monkeypatch.context() as patch:
            patch.setattr(LayerMajor, "_keep", fails)
            if where == "backward":
                patch.setattr(LayerMajor, "_loss", loss_fails)
            with contextlib.suppress(torch.OutOfMemoryError):
                step([random_batch(seed=j) for j in range(2)])
        assert kept and not any(ref() is not None for ref in kept)
    finally:
        gc.enable()
    assert step.relieve() == "memory.layers_kept: 1"
    assert same(outcome(made), expected)


def test_relief_keeps_fewer_layers_before_anything_is_moved_and_changes_no_bit(step_of):
    made = _, step = step_of(layers_kept=99)
    expected, said = outcome(step_of()), []
    while step.layers_kept:
        said.append(step.relieve())
        assert same(outcome(made), expected)
    assert said == ["memory.layers_kept: 2", "memory.layers_kept: 1", "memory.layers_kept: 0"]
    assert step.relieve() == "memory.activations: host"


def test_inputs_of_kept_layers_do_not_travel(step_of):
    """They stay where the layers' graphs hold them; only what lies below goes to the host and comes back."""
    _, step = step_of(layers_kept=2, activations="host")
    step([random_batch(2, 40, seed=j) for j in range(2)])
    boundary = 2 * 40 * 64 * 4
    assert step.activations._arena.numel() == (LAYERS - 2) * 2 * boundary - boundary


def test_a_backward_outside_of_a_visit_is_an_error_and_no_wrong_number(step_of):
    _, step = step_of("mixtral")
    layer, entry = step.blocks.layers[1], step.blocks.prologue(random_batch())
    x = torch.randn(1, 12, 64, requires_grad=True)
    with step.residency.visit(1), without_weights(layer):
        y = step.blocks.layer(1, x, entry)
    with pytest.raises(AssertionError, match="outside of a visit"):
        y.sum().backward()


def test_layers_kept_needs_whole_layers_that_run_one_at_a_time(tmp_path):
    for other in ({"layer_tile_tokens": 64}, {"order": "standard"}):
        with pytest.raises(ValidationError, match=r"memory\.layers_kept"):
            MemoryConfig(layers_kept=2, **other)
    with pytest.raises(ModelError, match=r"memory\.layers_kept: 2: .*cannot be cut"):
        choose(TwiceThrough(tiny_config("llama")), CPU, MemoryConfig(layers_kept=2), 0, tmp_path, print)
