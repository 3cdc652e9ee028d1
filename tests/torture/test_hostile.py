"""Files from anyone: nothing in them is executed, asks the network, or writes elsewhere.

Every test here runs under a watch on the interpreter itself (PEP 578): each socket, name look-up, file opened to be
written, process started and name taken out of a pickle is an event, from whichever library it comes.
"""

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import qlora
from qlora.config import ModelConfig
from qlora.errors import DataError, ModelError, QLoRAError
from qlora.model.adapters import load_adapter
from qlora.model.cache import open_cache
from qlora.model.load import load_base
from qlora.model.source import open_source, read_tokenizer
from qlora.recipe import load_recipe
from tests import tiny

ROOT = Path(__file__).parents[2]
PICKLES = ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "training_args.bin", "rng_state.pth"]
PICKLES += ["optimizer.pt", "scheduler.pt", "adapter_model.bin"]

watching: list[list[str]] = []  # the events that the test running now has caused
allowed: list[Path] = []


def _hook(event: str, args: tuple) -> None:
    if not watching:
        return
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        watching[-1].append(f"{event} {args[-1]}")
        raise OSError("a test opened a socket")
    if event == "socket.__new__" and args[1] not in (-1, 1):  # 1: Unix, which asyncio wakes itself with
        watching[-1].append(event)
    elif event == "pickle.find_class":
        watching[-1].append(f"unpickled {args}")
    elif event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        watching[-1].append(f"{event} {args[0]}")
    elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        name = os.fsdecode(args[0]) if isinstance(args[0], str | bytes) else ""
        path = Path(name).absolute()
        ours = any(path.is_relative_to(place) for place in allowed)
        if name and not ours and "__pycache__" not in path.parts and not path.is_relative_to("/dev"):
            watching[-1].append(f"wrote {path}")


sys.addaudithook(_hook)


@pytest.fixture(autouse=True)
def nothing_happens(tmp_path, tmp_path_factory):
    """0 executions, 0 network calls, 0 files outside."""
    with watched(tmp_path, tmp_path_factory.getbasetemp()) as events:
        yield
    assert not events
    assert not list(tmp_path.rglob("canary*"))


@contextmanager
def watched(*places: Path):
    allowed[:] = places
    watching.append([])
    try:
        yield watching[-1]
    finally:
        watching.pop()


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


def plant(directory: Path, canary: Path) -> None:
    """One pickle of every kind, in the two forms that torch.load takes."""
    for n, name in enumerate(PICKLES):
        if n % 2:
            (directory / name).write_bytes(pickle.dumps(Payload(canary)))
        else:
            torch.save(Payload(canary), directory / name)


@pytest.fixture
def model(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny.chat_model(checkpoint), tmp_path / "model"))


@pytest.fixture
def canary(tmp_path) -> Path:
    return tmp_path / "canary"


def code(path: Path, canary: Path) -> None:
    """A module that leaves the canary when it is imported."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"import os\nos.mkdir({str(canary)!r})\n")


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def trained(model: Path, directory: Path, **sections):
    sections["training"] = {"max_steps": 2} | sections.get("training", {})
    directory.mkdir(exist_ok=True)
    config = tiny.recipe(model, directory, **sections)
    return config, qlora.train(config, sinks=[])


def read(path: Path):
    return pickle.loads(path.read_bytes())


def test_the_watch_sees_a_pickle_a_socket_and_a_file(tmp_path, canary):
    plant(tmp_path, canary)
    with watched(tmp_path / "nowhere") as events:
        for opened in (
            lambda: torch.load(tmp_path / PICKLES[0], weights_only=False),
            lambda: read(tmp_path / PICKLES[1]),
        ):
            opened()
            assert canary.is_dir()
            canary.rmdir()
        with pytest.raises(OSError, match="a socket"):
            __import__("socket").create_connection(("localhost", 1))
        (tmp_path / "file").write_text("")
    assert len([e for e in events if e.startswith("unpickled")]) == 2
    assert any(e.startswith("socket.") for e in events) and any(e.startswith("wrote") for e in events)


def test_pickles_beside_safetensors_are_never_opened(model, tmp_path, canary):
    """In a model's directory, in an adapter's, and in a checkpoint and the output directory of a run that goes on."""
    plant(model, canary)
    saves = {"save_steps": 1, "max_steps": 2}
    config, _ = trained(model, tmp_path / "run", training=saves)
    output = Path(config.training.output_dir)
    for directory in (output, *output.glob("checkpoint-*")):
        plant(directory, canary)
    config = tiny.recipe(model, tmp_path / "run", training=saves | {"max_steps": 4})
    assert qlora.train(config, resume=True, sinks=[]).progress.step == 4
    plant(output, canary)
    assert isinstance(qlora.generate(output, "Who?", max_new_tokens=2), str)


@pytest.mark.parametrize("name", PICKLES)
def test_a_model_or_adapter_that_is_only_a_pickle_is_refused(name, model, tmp_path, canary):
    (model / "model.safetensors").unlink()
    torch.save(Payload(canary), model / name)
    for path in (model, model / name):
        with pytest.raises(QLoRAError, match=f"(?s){re.escape(name)}.*safetensors"):
            open_source(ModelConfig(model_name_or_path=str(path)))


def test_an_adapter_that_is_only_a_pickle_is_refused(model, tmp_path, canary):
    base = AutoModelForCausalLM.from_pretrained(model)
    peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    plant(tmp_path / "a", canary)
    with pytest.raises(QLoRAError, match=r"adapter_model\.bin"):
        load_adapter(loaded(model), str(tmp_path / "a"))


def loaded(model: Path):
    config = tiny.recipe(model, model)
    return load_base(config, open_source(config.model), torch.device("cpu")).model


# ---- hostile configurations, templates and archives: spoil(model directory, canary) ----------------------------------


def auto_map_of_a_known_model(model, canary):
    code(model / "evil.py", canary)
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    change(model / "config.json", auto_map=names)
    change(model / "tokenizer_config.json", auto_map=names)


def auto_map_of_an_unknown_model(model, canary):
    auto_map_of_a_known_model(model, canary)
    change(model / "config.json", model_type="evil", architectures=["M"])


def auto_map_of_another_repository(model, canary):
    change(model / "config.json", model_type="evil", auto_map={"AutoConfig": "user/repo--evil.C"})


def tokenizer_class_of_its_own(model, canary):
    code(model / "evil.py", canary)
    change(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": "evil.T"})


def old_auto_map(model, canary):
    code(model / "evil.py", canary)
    change(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=["evil.T", None])


def attention_kernel(model, canary):
    change(model / "config.json", _attn_implementation_internal="user/repo:fn", attn_implementation="user/repo")


def attention_kernel_of_the_community(model, canary):
    change(model / "config.json", _attn_implementation="kernels-community/flash-attn2")


def attention_kernel_in_a_part(model, canary):
    change(model / "config.json", text_config={"_attn_implementation": "user/repo"})


def experts_kernel(model, canary):
    change(model / "config.json", experts_implementation="sonicmoe")


def kernel_mapping(model, canary):
    change(model / "config.json", use_kernels=True, kernel_config={"RMSNorm": "user/repo:fn"})


def quantized_by_another(model, canary):
    change(model / "config.json", quantization_config={"quant_method": "mxfp4"})


def custom_generate(model, canary):
    code(model / "custom_generate" / "generate.py", canary)
    change(
        model / "generation_config.json", custom_generate=str(model), penalty_alpha=0.6, top_k=4, trust_remote_code=True
    )


def generation_without_end(model, canary):
    change(
        model / "generation_config.json", num_beams=10**6, cache_implementation="x", max_length=-3, dola_layers="low"
    )


def trust_in_every_file(model, canary):
    auto_map_of_an_unknown_model(model, canary)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        change(model / name, trust_remote_code=True)


def adapter_beside_the_model(model, canary):
    """transformers' own way to an adapter: a directory with both."""
    change(model / "adapter_config.json", peft_type="LORA", r=10**12, base_model_name_or_path="user/repo")
    torch.save(Payload(canary), model / "adapter_model.bin")


def template(text):
    def spoil(model, canary):
        (model / "chat_template.jinja").write_text(text.replace("CANARY", str(canary)))

    return spoil


ESCAPES = {
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "lipsum": "{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
    "attr": "{{ (''|attr('__class__')|attr('__mro__'))[1] }}",
    "import": "{% include '/etc/passwd' %}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "range": "{{ range(10**10)|list }}",
    "mutate": "{{ messages.append({}) }}",
}


def index_above(model, canary):
    shutil.copy(model / "model.safetensors", model.parent / "m.safetensors")
    change(model / "model.safetensors.index.json", weight_map={"x": "../m.safetensors"})


def index_absolute(model, canary):
    shutil.copy(model / "model.safetensors", model.parent / "m.safetensors")
    change(model / "model.safetensors.index.json", weight_map={"x": str(model.parent / "m.safetensors")})


def index_backslash(model, canary):
    change(model / "model.safetensors.index.json", weight_map={"x": "..\\m.safetensors"})


def index_of_a_pickle(model, canary):
    torch.save(Payload(canary), model / "pytorch_model.bin")
    change(model / "model.safetensors.index.json", weight_map={"x": "pytorch_model.bin"})


def weights_that_are_a_link(model, canary):
    (model / "model.safetensors").rename(model.parent / "m.safetensors")
    (model / "model.safetensors").symlink_to(model.parent / "m.safetensors")


def weights_with_a_huge_header(model, canary):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def weights_that_are_a_pickle(model, canary):
    torch.save(Payload(canary), model / "model.safetensors")


def layers_without_end(model, canary):
    change(model / "config.json", num_hidden_layers=10**9)


def a_size_without_end(model, canary):
    change(model / "config.json", hidden_size=10**12)


HARMLESS = [auto_map_of_a_known_model, custom_generate, generation_without_end, adapter_beside_the_model]
HARMLESS += [tokenizer_class_of_its_own, old_auto_map]  # the tokenizer.json is read, by transformers' own class
REFUSED = [
    *(auto_map_of_an_unknown_model, auto_map_of_another_repository, trust_in_every_file),
    *(attention_kernel, attention_kernel_of_the_community, attention_kernel_in_a_part, experts_kernel, kernel_mapping),
    *(quantized_by_another, index_above, index_absolute, index_backslash, index_of_a_pickle, weights_that_are_a_link),
    *(weights_with_a_huge_header, weights_that_are_a_pickle, layers_without_end, a_size_without_end),
]


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_a_hostile_model_is_refused(spoil, model, tmp_path, canary):
    spoil(model, canary)
    with pytest.raises(ModelError):
        trained(model, tmp_path / "run")


@pytest.mark.parametrize("spoil", HARMLESS, ids=lambda spoil: spoil.__name__)
def test_what_is_not_asked_for_in_a_model_does_nothing(spoil, model, tmp_path, canary):
    spoil(model, canary)
    try:
        config, _ = trained(model, tmp_path / "run")
    except QLoRAError:
        assert spoil in (tokenizer_class_of_its_own, old_auto_map)  # by version of transformers
    else:
        assert isinstance(qlora.generate(config.training.output_dir, "Who?", max_new_tokens=2), str)


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(name, model, tmp_path, canary):
    template(ESCAPES[name])(model, canary)
    with pytest.raises(DataError, match="template"):
        trained(model, tmp_path / "run")


def test_an_adapters_tokenizer_runs_no_code(model, tmp_path, canary):
    tokenizer_class_of_its_own(model, canary)
    change(model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})
    try:
        read_tokenizer(model)
    except QLoRAError as error:
        assert str(model) in str(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"parent_library": "evil", "base_model_class": "M"}},
        {"megatron_config": {"x": 1}, "megatron_core": "megatron.evil"},
        {"r": 10**12},
        {"layer_replication": [[0, 10**9]]},
    ],
    ids=str,
)
def test_a_hostile_adapter_runs_nothing(changes, model, tmp_path, canary, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(model)
    peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    change(tmp_path / "a" / "adapter_config.json", **changes)
    code(tmp_path / "evil.py", canary)
    code(tmp_path / "megatron" / "evil.py", canary)
    monkeypatch.syspath_prepend(tmp_path)
    if "auto_mapping" in changes:
        load_adapter(loaded(model), str(tmp_path / "a"))
    else:
        with pytest.raises(QLoRAError):
            load_adapter(loaded(model), str(tmp_path / "a"))


def test_a_gguf_file_with_absurd_counts_is_refused(tmp_path):
    for counts in ((1 << 63, 0), (0, 1 << 63), (1 << 40, 1 << 40)):
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(np.zeros(4096, np.uint8)))
        with pytest.raises(QLoRAError, match="more than there can be"):
            open_source(ModelConfig(model_name_or_path=str(tmp_path / "m.gguf")))


def test_a_caches_manifest_cannot_name_other_files(model, tmp_path):
    memory = {"nf4_cache_dir": str(tmp_path / "cache")}
    config, _ = trained(model, tmp_path / "run", method="qlora", memory=memory)
    [path] = tmp_path.glob("cache/nf4/*/manifest.json")
    content, source = path.read_text(), open_source(config.model)
    shard = json.loads(content)["shards"]["dense"]["file"]
    settings = {"double_quant": True, "quant_type": "nf4"}
    assert open_cache(tmp_path / "cache", source, settings, torch.float32) is not None
    (tmp_path / "elsewhere").write_bytes((path.parent / shard).read_bytes())
    for name in ("../../../elsewhere", str(tmp_path / "elsewhere"), "..\\elsewhere"):
        path.write_text(content.replace(f'"{shard}"', json.dumps(name)))
        said: list[str] = []
        assert open_cache(tmp_path / "cache", source, settings, torch.float32, said.append) is None and said
    path.write_text(content)
    (path.parent / shard).unlink()
    (path.parent / shard).symlink_to(tmp_path / "elsewhere")
    assert open_cache(tmp_path / "cache", source, settings, torch.float32) is None


@pytest.mark.parametrize("offline", ["", "1"])
def test_a_run_on_local_files_asks_the_network_nothing(offline, model, tmp_path):
    """A whole run in a process of its own, in which any connection or name look-up is an error and is printed."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny.recipe_text(model, tmp_path, training={"max_steps": 2}))
    assert load_recipe(recipe)
    script = """
import sys
asked = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        asked.append(event)
        raise OSError("no network")
sys.addaudithook(hook)
import qlora
config = qlora.load_recipe(sys.argv[1])
qlora.train(config, sinks=[])
qlora.generate(config.training.output_dir, "Who?", max_new_tokens=2)
print("asked", asked)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"HF_HUB_OFFLINE": offline} if offline else {})
    with watched(Path("/")) as events:
        done = subprocess.run(
            [sys.executable, "-c", script, str(recipe)], env=environment, capture_output=True, text=True, timeout=120
        )
    assert len(events) == 1  # this process
    assert done.stdout.splitlines()[-1] == "asked []", done.stderr[-2000:]
