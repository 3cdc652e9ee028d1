"""No secret gets out: not of the environment, not of a recipe, whatever it is that is told."""

import json
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.bench.environment import surroundings
from qlora.redact import is_secret_name, redact, redacted
from tests.bench.factory import cpu

CANARY = 'c4nary/with "odd" signs & more'


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    """This machine's own token is no part of the test."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MY_SECRET_THING", "DB_PASSWORD", "AWS_ACCESS_KEY_ID"],
)
def test_a_secret_of_the_environment_is_taken_out_however_it_is_spelt(name, monkeypatch):
    monkeypatch.setenv(name, CANARY)
    told = f"plain {CANARY}; JSON {json.dumps(CANARY)}; address /c4nary%2Fwith%20%22odd%22%20signs%20%26%20more?"
    assert redact(told) == 'plain ***; JSON "***"; address /***?'
    monkeypatch.delenv(name)
    assert redact(told) == told


def test_a_long_secret_that_a_message_cuts_is_taken_out_as_well(monkeypatch):
    secret = "0123456789abcdef" * 5
    monkeypatch.setenv("HF_TOKEN", secret)
    assert redact(f"expects a number, got the text `{secret[:47]}…`") == "expects a number, got the text `***`"
    assert redact(secret + secret) == "******"
    assert redact("012345678") == "012345678"


def test_what_the_environment_has_that_is_no_secret_stays(monkeypatch, tmp_path):
    (tmp_path / "key.json").touch()
    plain = {
        "SSH_AUTH_SOCK": "/run/user/1000/agent",
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json"),
        "TOKENIZERS_PARALLELISM": "sometimes",
        "SHORT_TOKEN": "seven77",  # would take words out of texts
        "MAX_TOKENS": "123456789",
    }
    for name, value in plain.items():
        monkeypatch.setenv(name, value)
    told = " ".join(plain.values())
    assert redact(told) == told


def test_the_token_of_a_login_is_known_from_the_day_it_is_saved(tmp_path, monkeypatch):
    assert redact("an-old-kind-of-token") == "an-old-kind-of-token"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("an-old-kind-of-token\n")
    assert redact("an-old-kind-of-token") == "***"
    (tmp_path / "elsewhere").write_text("another-token")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "elsewhere"))
    assert redact("another-token, an-old-kind-of-token") == "***, an-old-kind-of-token"


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("no such repo with hf_abcdefghijklmnop1234.", "no such repo with ***."),
        ("x=hf_oauth_abcdefghijklmnop1234", "x=***"),
        ("sk-proj-abcd1234efgh5678 ghp_abcdefghijklmnop1234 github_pat_abcdefghijklmnop_1234", "*** *** ***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("https://me:pass@word@host/a.jsonl", "https://***@host/a.jsonl"),
        ("s3://key@bucket/a", "s3://***@bucket/a"),
        ('"https://host/a?X-Signature=abc&b=c" is', '"https://host/a?***" is'),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer ***"),
        ("--api-key abcd1234 --set x", "--api-key *** --set x"),
        (f"wandb api_key: {'a1' * 20}", "wandb api_key: ***"),
        ("'password': 'letmeinplease'", "'password': '***'"),
        ("hub_token=letmeinplease", "hub_token=***"),
    ],
)
def test_what_looks_like_a_secret_is_taken_out(told, shown):
    assert redact(told) == shown


@pytest.mark.parametrize(
    "told",
    [
        f"commit {'a1' * 20}",
        "pad_token: <|endoftext|>, eos_token=</s>, 12,345 tokens/s, tokenizer: hf_model",
        "risk-averse sk-learn-contrib-packages; ask-me-anything-about-1234",
        "is it? yes: step 3: http://host/a, me@home",
        "unknown key `hf_token`\n  did you mean `model.revision`?",
        "the secret of it, and passwords that people choose",
    ],
)
def test_what_only_looks_alike_stays(told):
    assert redact(told) == told


def test_in_nested_values_texts_lose_their_secrets_and_secret_keys_their_values():
    token = "hf_abcdefghijklmnop1234"
    event = {
        "loss": 1.5,
        "token": "short",
        "hub": {"password": 1234, "api_key": ["a", "b"], "eos_token": "</s>", "hf_token": None},
        "samples": [{"prompt": f"my {token}"}, (f"{token}", 2, True)],
        f"https://me:{token}@host": "",
    }
    assert redacted(event) == {
        "loss": 1.5,
        "token": "***",
        "hub": {"password": "***", "api_key": "***", "eos_token": "</s>", "hf_token": None},
        "samples": [{"prompt": "my ***"}, ("***", 2, True)],
        "https://***@host": "",
    }
    assert event["token"] == "short"  # what it was given is not changed


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_any_value_keeps_its_shape_and_a_second_time_changes_nothing(value):
    once = redacted({"value": value})
    assert repr(redacted(once)) == repr(once)
    assert isinstance(redact("a"), str)


@pytest.mark.parametrize("hostile", ["://", "://a", "sk-", "-eyJaaaaaaaaaa", "hf_", "api_key ", "api_key='", "a"])
def test_a_long_text_takes_time_in_proportion(hostile):
    text = hostile * (200_000 // len(hostile))
    started = time.perf_counter()
    redact(text)
    assert time.perf_counter() - started < 5.0  # quadratic would be minutes


def test_names():
    assert all(map(is_secret_name, ("token", "hf_token", "HF-Token", "client_secret", "apiKey", "credentials")))
    assert not any(map(is_secret_name, ("tokens", "max_tokens", "tokenizer", "bos_token", "pad_token", "keys", "path")))


def test_results_of_benchmarks_have_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setattr(sys, "argv", ["qlora", "bench", "--model", f"/models/{CANARY}", "--steps", "3"])
    results = cpu()
    results.environment |= surroundings()
    assert "'/models/***' --steps 3" in results.environment["command"]
    results.settings["model"] = [f"/models/{CANARY}"]
    results.rows[0].error = "ConnectionError: https://me:pa55word@host"
    results.write(tmp_path / "out.json")
    written = (tmp_path / "out.json").read_text()
    assert (
        "c4nary" not in written and "pa55" not in written and "https://***@host" in written and "/models/***" in written
    )
