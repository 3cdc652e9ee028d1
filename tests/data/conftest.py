"""A small real tokenizer, built here, that wears the chat templates of well-known model families."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora.config import DatasetConfig

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}"
    "{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# The thoughts of all turns before the last question are taken away; the last answer always has some.
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] != 'assistant' %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% else %}"
    "{% set said = message['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = '' %}"
    "{% if '</think>' in message['content'] %}"
    "{% set thought = message['content'].split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ said }}<|im_end|>\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ends what is not a prompt with EOS, so that the rendering of fewer turns is not the beginning of that of more.
PHI3 = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Asks with the thought begun, and leaves thoughts out of what was said.
DEEPSEEK = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|Assistant|>{{ message['content'].split('</think>')[-1] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}<|User|>{{ message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# Closes the last turn otherwise than those before.
GPT_OSS = (
    "{% for message in messages %}"
    "<|start|>{{ message['role'] }}"
    "{% if message['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ message['content'] }}"
    "{{ '<|return|>' if loop.last and message['role'] == 'assistant' else '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template as a model family ships it.

    opening, closing  what is learned around an answer: what the generation prompt leaves to say, and the end token
    adds_bos          whether the tokenizer itself puts BOS before a text
    """

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    closing: str
    opening: str = ""
    last_opening: str | None = None
    last_closing: str | None = None
    adds_bos: bool = False
    has_system: bool = True

    def learned(self, answers: Sequence[str]) -> list[str]:
        """The stretches of text that are to be learned of a conversation with these answers."""
        *earlier, last = answers
        opening = self.opening if self.last_opening is None else self.last_opening
        closing = self.closing if self.last_closing is None else self.last_closing
        return [f"{self.opening}{answer}{self.closing}" for answer in earlier] + [f"{opening}{last}{closing}"]


IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "chatml": Family(CHATML, IM, "<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "llama3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        adds_bos=True,
    ),
    "gemma": Family(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        adds_bos=True,
        has_system=False,
    ),
    "mistral": Family(MISTRAL, ("<s>", "</s>"), "<s>", "</s>", "</s>", opening=" ", adds_bos=True, has_system=False),
    "qwen3": Family(QWEN3, IM, None, "<|im_end|>", "<|im_end|>", last_opening="<think>\n\n</think>\n\n"),
    "phi3": Family(
        PHI3,
        ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        None,
        "<|endoftext|>",
        "<|end|>",
    ),
    "deepseek": Family(
        DEEPSEEK, ("<bos>", "<eos>", "<|User|>", "<|Assistant|>"), "<bos>", "<eos>", "<eos>", adds_bos=True
    ),
    "gpt-oss": Family(
        GPT_OSS,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        None,
        "<|return|>",
        "<|end|>",
        opening="<|channel|>final<|message|>",
        last_closing="<|return|>",
    ),
}

_CORPUS = [
    "The cat sat on the mat. What is your name? My name is Ada, and I live in Oslo.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "Hello, how are you? I am well, thank you. What is the answer to the question?",
    '{"name": "Ada", "city": "Oslo"}\n\n',
] * 4


@functools.cache
def _trained() -> str:
    """The JSON of a byte-level BPE, so that every text has tokens and some tokens are several letters or newlines."""
    tokenizer = Tokenizer(models.BPE())
    # As Llama 3 and Qwen cut words: a run of newlines is one piece, whatever comes after it.
    words = Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    cuts = [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer.to_str()


@functools.cache
def family_tokenizer(name: str, *, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A family's tokenizer. trim_offsets: offsets of white space are empty, as in Llama 3's."""
    family = FAMILIES[name]
    return build_tokenizer(
        family.template,
        family.special,
        bos=family.bos,
        eos=family.eos,
        adds_bos=family.adds_bos,
        trim_offsets=trim_offsets,
    )


def build_tokenizer(
    template: str | None,
    special: Sequence[str],
    *,
    bos: str | None = None,
    eos: str | None = None,
    adds_bos: bool = False,
    trim_offsets: bool = False,
) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(_trained())
    backend.add_special_tokens(list(special))
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if adds_bos and bos:
        steps.append(
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
        )
    backend.post_processor = processors.Sequence(steps)  # type: ignore[assignment]
    names = {key: value for key, value in (("bos_token", bos), ("eos_token", eos)) if value}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


@pytest.fixture
def base_tokenizer() -> PreTrainedTokenizerFast:
    """A base model's: no chat template, and a BOS that it puts itself."""
    return build_tokenizer(None, ("<s>", "</s>"), bos="<s>", eos="</s>", adds_bos=True)


Write = Callable[..., DatasetConfig]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows (as JSON lines) or text to a file and returns the recipe's entry for it."""

    def write(name: str, content: Sequence[Any] | str | bytes, /, **fields: Any) -> DatasetConfig:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode()
        elif not isinstance(content, bytes):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(content)
        return DatasetConfig(path=str(path), **fields)

    return write
