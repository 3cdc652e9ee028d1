"""Many adapters on one base: each answers as it does alone, the base as if there were none, a swap loads nothing."""

import json
import shutil
import time

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoTokenizer

import qlora
from qlora.errors import AdapterError, DataError, ModelError
from qlora.live import BASE, Live, Question, _Row, named
from qlora.model.adapters import changes_base, read_config
from qlora.model.load import load_base
from qlora.model.source import open_source
from qlora.train.step import choose
from tests import tiny
from tests.serve.conftest import SAID


def asked(text):
    return [{"role": "user", "content": text}]


def test_each_adapter_answers_what_it_learned_however_often_they_are_swapped(live):
    for name in ("support", "legal", None, "legal", "support"):
        live.use(name)
        assert live.active == name
        for question, expected in SAID.get(name, {}).items():
            answer = live.answer(asked(question), 20)
            assert (answer.text, answer.ended) == (expected, "stop")


def test_an_adapter_among_others_answers_as_it_does_alone(live, adapters):
    live.use("legal")
    for question in ("Who?", "Something else?"):
        assert live.answer(asked(question), 12).text == qlora.generate(adapters["legal"], question, max_new_tokens=12)


def test_the_base_answers_as_if_no_adapter_had_ever_been_there(live, adapters):
    live.use(None)
    ids = live.prompt(asked("Who?"))
    with torch.no_grad():
        found = live._base.model(torch.tensor([ids])).logits
    config = qlora.load_recipe(adapters["support"] / "recipe.yaml")
    bare = load_base(config, open_source(config.model), torch.device("cpu")).model
    with choose(bare, torch.device("cpu"), config.memory, 0, ".", print).whole_model(1e12), torch.no_grad():
        assert torch.equal(found, bare(torch.tensor([ids])).logits)


def test_a_swap_loads_nothing_and_leaves_nothing_to_train(live, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", None)
    before = [p.data_ptr() for p in live._base.model.parameters()]
    for name in ("support", None, "legal"):
        live.use(name)
        assert not any(p.requires_grad for p in live._base.model.parameters())
    assert [p.data_ptr() for p in live._base.model.parameters()] == before


def test_a_swap_takes_under_50_ms_as_it_touches_each_adapted_layer_once_and_no_other(live, monkeypatch):
    adapted = [module for module in live._base.model.modules() if isinstance(module, BaseTunerLayer)]
    swaps, touched, took = ("support", None, "legal", "support", "legal", None), [], []
    real = BaseTunerLayer.set_adapter
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "modules", None)  # the way through all of the model
        patch.setattr(
            BaseTunerLayer, "set_adapter", lambda self, *a, **how: touched.append(self) or real(self, *a, **how)
        )
        for name in swaps:
            live.use(name)
            assert touched == adapted
            touched.clear()
    for name in swaps:  # the best of six, as other tests run beside this one
        started = time.perf_counter()
        live.use(name)
        took.append(time.perf_counter() - started)
    assert min(took) < 0.05


def test_what_an_adapter_trained_beside_its_lora_goes_and_comes_with_it(adapters, live, tmp_path):
    config = qlora.load_recipe(adapters["support"] / "recipe.yaml")
    model = load_base(config, open_source(config.model), torch.device("cpu")).model
    whole = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, whole)
    tuned.base_model.model.lm_head.modules_to_save["default"].weight.data.zero_()
    tuned.save_pretrained(tmp_path / "beside")
    (tmp_path / "beside" / "recipe.yaml").write_text((adapters["support"] / "recipe.yaml").read_text())

    def logits(live):
        with torch.no_grad():
            return live._base.model(torch.tensor([ids])).logits

    live.use(None)
    ids = live.prompt(asked("Who?"))
    base = logits(live)
    live.use("legal")
    legal = logits(live)
    with Live.load({"beside": tmp_path / "beside", "legal": adapters["legal"]}) as both:
        for name, expected in (("beside", None), (None, base), ("legal", legal), ("beside", None), ("legal", legal)):
            both.use(name)
            assert torch.equal(logits(both), torch.zeros_like(base) if expected is None else expected)


def test_side_by_side_each_question_has_its_own_length_and_end(live):
    live.use("support")
    pieces, stops = {"a": [], "b": []}, iter([False, False, True])
    long, short, until = (live.prompt(asked(text)) for text in ("The cat?", "Who?", "The cat?"))
    told = [
        Question(long, 20, on_text=pieces["a"].append),
        Question(short, 20),
        Question(until, 20, stop=["nothing", "sat on"], on_text=pieces["b"].append),
        Question(long, 3),
        Question(long, 20, requested=lambda: next(stops)),
    ]
    whole, brief, stopped, cut_off, asked_to = live.answers(told)
    assert (whole.text, brief.text, stopped.text) == ("The cat sat on the mat.", "Ada", "The cat ")
    assert [each.ended for each in (whole, brief, stopped, cut_off, asked_to)] == ["stop"] * 3 + ["length", "cut"]
    assert cut_off.tokens == 3 and asked_to.tokens == 3 and whole.text.startswith(cut_off.text)
    assert "".join(pieces["a"]) == whole.text and len(pieces["a"]) > 1
    assert "".join(pieces["b"]) == "The cat "  # what may have been the stop text was held back
    assert whole.prompt_tokens == len(long)


@pytest.mark.parametrize("text", ["Aé", "日本語 ok", "🙂!", "\n\n a  b"])
def test_the_pieces_are_the_text_whatever_bytes_its_tokens_are(live, text):
    voice = live._voices["support"]
    ids = voice.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = []
    row = _Row(Question([], len(ids) + 1, on_text=pieces.append), voice, None)
    for token in [*ids, voice.ends[0]]:
        row.take(token)
    assert row.answer().text == "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    broken = _Row(Question([], len(ids)), voice, None)  # cut amid a character
    for token in ids[:2]:
        broken.take(token)
    assert broken.answer().text == voice.tokenizer.decode(ids[:2])


def test_a_seed_gives_one_answer_whoever_asks_beside_it(live):
    live.use(None)
    prompt = live.prompt(asked("Who?"))
    drawn = [Question(prompt, 12, temperature=1.5, seed=seed) for seed in (1, 2)]
    alone = [live.answers([question])[0].text for question in drawn]
    together = [answer.text for answer in live.answers([drawn[1], Question(prompt, 12), drawn[0]])]
    assert [together[2], together[0]] == alone and alone[0] != alone[1]
    greedy = live.answers([Question(prompt, 12)])[0].text
    assert together[1] == greedy
    assert live.answers([Question(prompt, 12, temperature=1.5, top_p=1e-6)])[0].text == greedy
    unseeded = {live.answers([Question(prompt, 12, temperature=1.5)])[0].text for _ in range(4)}
    assert len(unseeded) > 1


def test_a_conversation_that_leaves_no_room_is_refused_before_it_is_tried(live):
    with pytest.raises(DataError, match=r"the prompt has [\d,]+ tokens; the model takes 256"):
        live.prompt(asked("cat " * 300))
    live.use("support")
    nearly = live.prompt(asked("cat " * 80))
    assert live.answers([Question(nearly, 10_000)])[0].tokens <= 256 - len(nearly)


# --- what cannot share a base


@pytest.fixture
def other(adapters, tmp_path):
    """A copy of an adapter, to be changed: with no hashes of what its run wrote."""
    shutil.copytree(adapters["legal"], tmp_path / "other", ignore=shutil.ignore_patterns("run.json"))
    return tmp_path / "other"


def rewrite(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def with_recipe(directory, **how):
    """Its recipe, with keys of `model` or `quantization` changed."""
    path = directory / "recipe.yaml"
    values = yaml.safe_load(path.read_text())
    for section, change in how.items():
        values[section] = values.get(section, {}) | change if isinstance(change, dict) else change
    path.write_text(yaml.safe_dump(values))


def test_an_adapter_for_another_base_is_named_with_both(adapters, other, checkpoint):
    elsewhere = tiny.chat_model(checkpoint, "qwen2")
    with_recipe(other, model={"model_name_or_path": str(elsewhere)})
    with pytest.raises(AdapterError, match=rf"(?s){other}: for another base than .*{elsewhere}, not "):
        Live.load({"support": adapters["support"], "other": other})


def test_an_adapter_for_other_weights_under_the_same_name_is_told_apart(adapters, other, tmp_path):
    model = qlora.load_recipe(other / "recipe.yaml").model.model_name_or_path
    shutil.copytree(model, tmp_path / "model")
    with (tmp_path / "model" / "model.safetensors").open("r+b") as f:
        f.seek(-3000, 2)
        f.write(b"\0" * 3000)
    with_recipe(other, model={"model_name_or_path": str(tmp_path / "model")})
    with pytest.raises(AdapterError, match="for another base"):
        Live.load({"support": adapters["support"], "other": other})


def test_a_base_that_has_moved_is_the_same_base(adapters, other, tmp_path):
    model = qlora.load_recipe(other / "recipe.yaml").model.model_name_or_path
    shutil.copytree(model, tmp_path / "moved")
    with_recipe(other, model={"model_name_or_path": str(tmp_path / "moved")})
    with Live.load({"support": adapters["support"], "other": other}) as live:
        live.use("other")
        assert live.answer(asked("Who?"), 20).text == SAID["legal"]["Who?"]
    with_recipe(other, model={"model_name_or_path": "gone/for-good/"})
    with pytest.raises(ModelError, match=f"{other}: its base cannot be opened"):
        Live.load({"other": other})
    with Live.load({"other": other}, base=str(tmp_path / "moved")) as live:
        assert live.answer(asked("Who?"), 20).text == SAID["legal"]["Who?"]


def test_another_form_of_the_base_is_said_key_by_key(adapters, other):
    with_recipe(other, quantization={"bnb_4bit_use_double_quant": False})
    with pytest.raises(
        AdapterError, match=r"(?s)another form .*\n  quantization.bnb_4bit_use_double_quant: False, not True$"
    ):
        Live.load({"support": adapters["support"], "other": other})
    with_recipe(other, method="lora")
    with pytest.raises(AdapterError, match=r"\n  method: lora, not qlora$"):
        Live.load({"support": adapters["support"], "other": other})


def test_an_adapter_without_a_recipe_goes_with_the_form_that_the_others_have(adapters, other):
    (other / "recipe.yaml").unlink()
    with Live.load({"other": other, "support": adapters["support"]}) as live:
        assert live.active == "other"
        assert live.answer(asked("Who?"), 20).text == SAID["legal"]["Who?"]


@pytest.mark.parametrize("change", [{"bias": "all"}, {"init_lora_weights": "pissa_niter_4"}])
def test_an_adapter_that_changes_the_base_is_used_alone_and_the_base_not_at_all(change, adapters, other):
    rewrite(other / "adapter_config.json", lambda config: config.update(change))
    with pytest.raises(AdapterError, match=f"{other}: .* cannot share one with other adapters"):
        Live.load({"support": adapters["support"], "other": other})
    with Live.load({"other": other}) as live:
        assert not live.has_base and changes_base(read_config(other))
        with pytest.raises(AdapterError, match="cannot answer alone"):
            live.use(None)


def test_the_second_adapters_files_are_looked_through_as_the_firsts_are(adapters, other):
    rewrite(other / "adapter_config.json", lambda config: config.update(r=10**6))
    with pytest.raises(AdapterError, match="a rank of 1000000"):
        Live.load({"support": adapters["support"], "other": other})
    (other / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(AdapterError, match="truncated or not a safetensors file"):
        Live.load({"support": adapters["support"], "other": other})


@pytest.mark.parametrize("name", [BASE, "", "../x", "a/b", ".hidden", "ä", "a" * 65, "a b"])
def test_a_name_with_a_path_in_it_is_refused(name, adapters):
    with pytest.raises(AdapterError, match="not a name for an adapter"):
        Live.load({name: adapters["legal"]})


def test_adapters_are_named_on_the_command_line_or_by_their_directory(tmp_path):
    (tmp_path / "orders").mkdir()
    assert named(["a=x/y", str(tmp_path / "orders"), f"b={tmp_path}/k=v"]) == {
        "a": named(["a=x/y"])["a"],
        "orders": tmp_path / "orders",
        "b": tmp_path / "k=v",
    }
    with pytest.raises(AdapterError, match="two adapters of this name"):
        named(["a=x", "a=y"])
    with pytest.raises(AdapterError, match="no adapter was given"):
        Live.load({})


def test_whoever_is_not_there_is_answered_with_who_is(live):
    with pytest.raises(AdapterError, match="nobody: no such adapter here; there are support, legal"):
        live.use("nobody")


def test_an_adapter_that_is_not_what_its_run_wrote_does_not_answer(adapters, tmp_path):
    damaged = shutil.copytree(adapters["support"], tmp_path / "damaged")
    (damaged / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(AdapterError, match=r"damaged: chat_template.jinja is not what its run wrote"):
        Live.load({"support": damaged})


def test_each_adapter_keeps_its_own_template(adapters, other):
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = tokenizer.chat_template.replace("You are helpful.", "Short.")
    tokenizer.save_pretrained(other)
    with Live.load({"support": adapters["support"], "other": other}) as live:
        first = live.prompt(asked("Who?"))
        live.use("other")
        assert "Short." in tokenizer.decode(live.prompt(asked("Who?")))
        assert "Short." not in tokenizer.decode(first)
