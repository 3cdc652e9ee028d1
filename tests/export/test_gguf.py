"""GGUF files that say what the safetensors said: read back by transformers, and answered by llama.cpp."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qlora.config import ModelConfig
from qlora.data.chat import end_token_ids, render_prompt
from qlora.errors import AdapterError, MachineError, ModelError
from qlora.export import gguf as export
from qlora.export import gguf_model, llama_cpp
from qlora.export.llama_cpp import Answer, Run, compare
from qlora.model.source import open_source
from tests import tiny
from tests.data.conftest import _CORPUS, CHATML

IM = ("<|im_start|>", "<|im_end|>")
TEXT = "def add(a, b):\n    return a + 1234\n\n\n  Hello,  it's   I'LL 56% of 7.8! \t Ünïcödé 日本語 🙂 end\n"
CHAT = [{"role": "user", "content": "What is 12 + 34?"}, {"role": "assistant", "content": "46"}]
DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
CUTS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(gguf_model._LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(gguf_model._LLAMA3.replace("{1,3}", "")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def chat_tokenizer(cut="qwen2", bos=None):
    """A byte-level tokenizer that cuts words as a family does, trained here."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(CUTS[cut])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [*_CORPUS, TEXT, TEXT]
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(list(IM))
    tokenizer.add_tokens(["[user-made]"])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token=bos)
    made.chat_template = CHATML
    return made


def spm_tokenizer():
    """A tokenizer of SentencePiece's kind: spaces are letters, and what is not known falls back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words = trainers.BpeTrainer(vocab_size=460, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in _CORPUS], words)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [entry for entry in spec["added_tokens"] if entry["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    return made


@pytest.fixture(scope="module")
def merged(checkpoint, tmp_path_factory):
    """merged(architecture, tokenizer, **config) -> a directory as a merge leaves it, made once."""
    made = {}

    def make(architecture="llama", cut="qwen2", tokenizer=None, **changes) -> Path:
        key = (architecture, cut, tokenizer is None, *sorted(map(str, changes.items())))
        if key not in made:
            tokenizer = tokenizer or chat_tokenizer(cut)
            # Rows for tokens that are not there yet, as models have.
            size = {"vocab_size": -(-len(tokenizer) // 64) * 64, "max_position_embeddings": 256}
            path = tmp_path_factory.mktemp("merged") / f"tiny-{architecture}"
            shutil.copytree(checkpoint(architecture, **size, **changes), path)
            tokenizer.save_pretrained(path)
            made[key] = path
        return made[key]

    return make


def logits(model, ids=tuple(range(3, 40))):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


def read(gguf):
    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)


def whole(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def own(architecture):
    """What transformers takes for granted of an architecture when it reads a GGUF file."""
    gemma = {"head_dim": 256}
    return {
        "qwen3": {"head_dim": 128}, "mistral": {"sliding_window": None}, "gemma2": gemma, "gemma3_text": gemma
    }.get(architecture, {})  # fmt: skip


def with_config(directory, copy, **changes) -> Path:
    """A copy of a directory whose config.json says something else."""
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


@pytest.mark.parametrize("architecture", DENSE)
def test_transformers_reads_the_logits_that_were_written(merged, tmp_path, architecture):
    directory = merged(architecture, **own(architecture))
    expected = logits(whole(directory))
    for kind, tolerance in (("f16", 3e-3), ("bf16", 2e-2), ("q8_0", 8e-2)):  # rounding of weights, over the layers
        export.write_gguf(directory, tmp_path / f"{kind}.gguf", kind)
        found = logits(read(tmp_path / f"{kind}.gguf"))
        assert (found - expected).std() < tolerance * expected.std(), kind
        assert sorted(path.name for path in tmp_path.glob(".*")) == []
    sizes = [(tmp_path / f"{kind}.gguf").stat().st_size for kind in ("f16", "bf16", "q8_0")]
    assert sizes[0] == sizes[1] > sizes[2]


@pytest.mark.parametrize("cut", sorted(CUTS))
def test_transformers_reads_the_tokenizer_and_the_template_that_were_written(merged, tmp_path, cut):
    directory = merged(cut=cut)
    export.write_gguf(directory, tmp_path / "m.gguf", "f16")
    ours, theirs = (
        AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    )  # fmt: skip
    assert GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents() == cut
    assert theirs.apply_chat_template(CHAT, tokenize=False) == ours.apply_chat_template(CHAT, tokenize=False)
    assert theirs.eos_token == "<|im_end|>"
    held = ours.get_vocab()
    assert held.items() <= theirs.get_vocab().items()
    if cut in ("gpt-2", "qwen2"):  # others transformers reads as one of these; what llama.cpp does is tried below
        assert theirs.encode(TEXT) == ours.encode(TEXT)


def test_a_gguf_base_lends_its_metadata_and_the_merged_model_its_template(merged, tmp_path):
    directory = merged()
    export.write_gguf(directory, tmp_path / "base.gguf", "q8_0")
    changed = tmp_path / "changed"
    shutil.copytree(directory, changed)
    tokenizer = AutoTokenizer.from_pretrained(changed)
    tokenizer.chat_template = "{{ messages[0].content }}<|im_end|>"
    tokenizer.save_pretrained(changed)
    export.write_gguf(changed, tmp_path / "m.gguf", "f16", base_gguf=tmp_path / "base.gguf", eos_token_id=5)
    base, found = (GGUFReader(tmp_path / name).fields for name in ("base.gguf", "m.gguf"))
    differ = {key for key in base if not key.startswith("GGUF.") and base[key].contents() != found[key].contents()}
    assert base.keys() == found.keys()
    assert differ == {"general.file_type", "tokenizer.chat_template", "tokenizer.ggml.eos_token_id"}
    assert found["tokenizer.ggml.eos_token_id"].contents() == 5
    torch.testing.assert_close(
        logits(read(tmp_path / "m.gguf")), logits(whole(directory)), atol=0.1, rtol=1e-2
    )  # of about 20


def test_a_base_of_another_architecture_or_vocabulary_is_refused(merged, tmp_path):
    export.write_gguf(merged(), tmp_path / "base.gguf", "f16")
    with pytest.raises(ModelError, match=r"architecture is `llama`.*`qwen2`"):
        export.write_gguf(merged("qwen2"), tmp_path / "m.gguf", "f16", base_gguf=tmp_path / "base.gguf")
    other = merged(tokenizer=spm_tokenizer())
    with pytest.raises(ModelError, match="its tokenizer has 448 tokens, the merged model 512"):
        export.write_gguf(other, tmp_path / "m.gguf", "f16", base_gguf=tmp_path / "base.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


@pytest.mark.parametrize("architecture", ["olmo2", "gpt_neox", "mixtral"])
def test_an_architecture_that_cannot_be_carried_is_refused_by_name(merged, tmp_path, architecture):
    with pytest.raises(ModelError, match=f"`{architecture}` cannot be written as GGUF"):
        export.write_gguf(merged(architecture), tmp_path / "m.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling `dynamic`"),
    ],
)
def test_a_model_that_computes_otherwise_than_its_architecture_is_refused(merged, tmp_path, changes, named):
    own = {} if "rope_parameters" in changes else changes  # that one needs no other weights
    changed = with_config(merged(**own), tmp_path / "changed", **changes)
    with pytest.raises(ModelError, match=named):
        export.write_gguf(changed, tmp_path / "m.gguf", "f16")
    assert list(tmp_path.iterdir()) == [changed]


def test_where_llama_cpp_has_no_window_the_context_ends_where_one_would_be_seen(merged, tmp_path):
    export.write_gguf(merged("mistral", sliding_window=24), tmp_path / "m.gguf", "f16")
    assert GGUFReader(tmp_path / "m.gguf").fields["llama.context_length"].contents() == 24


def test_llama_3s_scaling_of_frequencies_goes_along_as_their_divisors(merged, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    changed = with_config(merged(), tmp_path / "changed", rope_parameters=rope)
    export.write_gguf(changed, tmp_path / "m.gguf", "f16")
    [factors] = [
        tensor.data for tensor in GGUFReader(tmp_path / "m.gguf").tensors if tensor.name == "rope_freqs.weight"
    ]
    plain = whole(merged()).model.rotary_emb.inv_freq
    torch.testing.assert_close(plain / torch.tensor(factors), whole(changed).model.rotary_emb.inv_freq)
    assert factors[0] == pytest.approx(1.0) and factors[-1] == pytest.approx(8.0)


def test_a_tokenizer_that_cuts_words_in_an_unknown_way_is_refused(checkpoint, tmp_path):
    with pytest.raises(ModelError, match="cuts words in a way that has no name"):
        export.write_gguf(tiny.chat_model(checkpoint), tmp_path / "m.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_beyond_f16_is_refused_and_bf16_takes_it(merged, tmp_path):
    directory = tmp_path / "large"
    shutil.copytree(merged(), directory)
    model = whole(directory)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(directory)
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight: has values beyond what F16 can hold"):
        export.write_gguf(directory, tmp_path / "m.gguf", "f16")
    export.write_gguf(directory, tmp_path / "m.gguf", "bf16")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), OSError("2048 requested and 144 written")])  # NumPy's
def test_a_full_disk_is_an_error_and_leaves_what_was_there(error, merged, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_text("old")
    monkeypatch.setattr(export.GGUFWriter, "write_tensor_data", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(MachineError, match=r"cannot be written: No space left.* \(needs"):
        export.write_gguf(merged(), tmp_path / "m.gguf", "f16")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.gguf", "old")]


# ---- adapters


def trained(directory, out, **lora) -> Path:
    """An adapter whose every weight matters, by PEFT alone."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora)
    model = get_peft_model(whole(directory), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(out), save_embedding_layers=False)
    return out


def base_of(directory):
    return open_source(ModelConfig(model_name_or_path=str(directory)))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"k_proj": 3}},
    ],
)
def test_the_adapter_file_has_the_change_that_peft_makes(merged, tmp_path, architecture, lora):
    directory = merged(architecture)
    adapter = trained(directory, tmp_path / "adapter", **lora)
    export.write_gguf_lora(adapter, tmp_path / "a.gguf", base_of(directory))
    reader = GGUFReader(tmp_path / "a.gguf")
    facts = {key: field.contents() for key, field in reader.fields.items()}
    assert (facts["general.type"], facts["adapter.type"]) == ("adapter", "lora")
    tensors = {tensor.name: np.array(tensor.data, np.float64) for tensor in reader.tensors}
    changed = PeftModel.from_pretrained(whole(directory), str(adapter)).merge_and_unload()
    changed.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "whole")
    bases = []
    for place in (directory, tmp_path / "whole"):  # both in the layout of the file
        export.write_gguf(place, tmp_path / "m.gguf", "bf16")
        read = gguf_model.Architecture.of(whole(place).config)
        state = whole(place).state_dict()
        bases.append({name: read.written(name, state[hf].numpy()) for name, hf in read.names.items() if hf in state})
    pairs = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert len(pairs) == 3 * 7
    for name in pairs:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        change = facts["adapter.lora.alpha"] / b.shape[1] * b @ a  # as llama.cpp computes it
        np.testing.assert_allclose(change, bases[1][name] - bases[0][name], atol=2e-6)


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)
def test_what_an_adapter_file_cannot_carry_is_refused_by_name(merged, tmp_path, lora, named):
    directory = merged(tie_word_embeddings=True)
    adapter = trained(directory, tmp_path / "adapter", **lora)
    with pytest.raises(AdapterError, match=named):
        export.write_gguf_lora(adapter, tmp_path / "a.gguf", base_of(directory))
    assert not (tmp_path / "a.gguf").exists()


def test_an_adapter_for_another_base_is_refused(merged, tmp_path):
    adapter = trained(merged(), tmp_path / "adapter")
    other = merged("llama", num_hidden_layers=2)
    with pytest.raises(AdapterError, match=r"layers\.2\."):
        export.write_gguf_lora(adapter, tmp_path / "a.gguf", base_of(other))


# ---- llama.cpp

needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp.find_spec("xllamacpp"), reason="needs the extra `llama-cpp`"
)  # fmt: skip


def greedy(model, tokenizer, chats, most=12):
    ends = end_token_ids(tokenizer)
    found = []
    for messages in chats:
        prompt = render_prompt(tokenizer, messages)
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=most, do_sample=False, eos_token_id=ends, pad_token_id=ends[0]
        )
        found.append(Answer(messages, prompt, out[0, len(prompt) :].tolist()))
    return found


@needs_llama_cpp
@pytest.mark.parametrize(
    ("architecture", "cut"),
    [
        *(("llama", "smollm"), ("llama", "llama-bpe"), ("mistral", "gpt-2"), ("qwen2", "qwen2"), ("qwen3", "qwen2")),
        *(("gemma2", "qwen2"), ("gemma3_text", "qwen2")),
    ],
)
def test_llama_cpp_says_what_the_model_says_merged_and_with_the_adapter_beside_it(merged, tmp_path, architecture, cut):
    directory = merged(architecture, cut, **own(architecture))
    adapter = trained(directory, tmp_path / "adapter")
    live = PeftModel.from_pretrained(whole(directory), str(adapter)).merge_and_unload()
    live.save_pretrained(tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(tmp_path / "whole")
    chats = [[{"role": "user", "content": text}] for text in ("Hello", TEXT, "12 and 345", "")]
    answers, ends = greedy(live, tokenizer, chats), end_token_ids(tokenizer)
    export.write_gguf(tmp_path / "whole", tmp_path / "m.gguf", "f16", eos_token_id=ends[0])
    export.write_gguf(directory, tmp_path / "base.gguf", "f16", eos_token_id=ends[0])
    export.write_gguf_lora(adapter, tmp_path / "a.gguf", base_of(directory))
    for gguf, lora in (("m.gguf", None), ("base.gguf", tmp_path / "a.gguf")):
        runs = llama_cpp.run(tmp_path / gguf, answers, ends, lora=lora, threads=1)
        found = compare(answers, runs, ends, lambda ids: logits(live, ids)[0, -1])
        assert found.rendered == 4
        # A random model's logits spread over about 10; F16 weights move them by some thousandths of it.
        assert all(difference.gap is not None and difference.gap < 0.1 for difference in found.differences)
        assert found.equal >= 3
    alone = compare(answers, llama_cpp.run(tmp_path / "base.gguf", answers, ends, threads=1), ends)
    assert alone.equal < 3  # or the adapter would not matter


@needs_llama_cpp
def test_llama_cpp_cuts_a_sentencepiece_text_as_the_tokenizer_does(merged, tmp_path):
    tokenizer = spm_tokenizer()
    directory = merged(tokenizer=tokenizer)
    export.write_gguf(directory, tmp_path / "m.gguf", "f16")
    chats = [[{"role": "user", "content": text}] for text in ("The cat sat on the mat.", "Where is it? 日本 x=1", "a")]
    answers = [Answer(chat, tokenizer.encode(chat[0]["content"] + "</s>"), [3]) for chat in chats]
    assert compare(answers, llama_cpp.run(tmp_path / "m.gguf", answers, [2], threads=1), [2]).rendered == 3


@needs_llama_cpp
def test_a_file_that_llama_cpp_cannot_load_is_an_error_in_this_process(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + os.urandom(200))
    with pytest.raises(ModelError, match=r"m\.gguf: llama\.cpp cannot run it"):
        llama_cpp.run(tmp_path / "m.gguf", [Answer([], [1], [2])], [2])


def test_without_llama_cpp_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match=r"pip install 'qlora-trainer\[llama-cpp\]'"):
        llama_cpp.run(tmp_path / "m.gguf", [], [2])


def test_a_difference_is_the_first_token_that_differs_with_its_gap():
    asked = [({"role": "user", "content": "x"},)] * 4
    answers = [
        Answer(chat, [1, 2], ids) for chat, ids in zip(asked, ([5, 6, 0], [5, 6, 0], [5, 6, 0], [5, 6]), strict=True)
    ]
    runs = [Run([1, 2], [5, 6], True), Run([1, 2], [5, 7], True), Run([1], [5], True), Run([1, 2], [5, 6, 7], False)]
    seen = []

    def after(ids):
        seen.append(ids)
        return torch.arange(8.0)

    found = compare(answers, runs, [0], after)
    assert (found.prompts, found.equal, found.rendered, found.ended, found.stopped) == (4, 1, 3, 3, 3)
    assert [(d.prompt, d.at, d.expected, d.found, d.gap) for d in found.differences] == [
        (1, 1, 6, 7, -1.0),
        (2, 1, 6, None, 6.0),
        (3, 2, -1, 7, None),
    ]
    assert seen == [[1, 2, 5], [1, 2, 5]]
