"""The library keeps adapters by name and version: whole, whoever writes at once and whenever the process dies."""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora import durable
from qlora.errors import AdapterError, MachineError
from qlora.library import registry as module
from qlora.library.files import record_of
from qlora.library.registry import Registry
from qlora.library.show import answer
from qlora.live import recipe_of
from qlora.lock import Lock
from tests.disk_faults import Calls, die, full, in_a_child

WEIGHT = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"


def adapter(directory: Path, seed: float = 0, run: dict | None = None, **config) -> Path:
    """A small adapter as a run leaves it, whose run.json has its files' hashes."""
    directory.mkdir(parents=True, exist_ok=True)
    facts = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "user/base", "r": 2}
    facts |= {"lora_alpha": 4, "target_modules": ["up_proj"]} | config
    (directory / "adapter_config.json").write_text(json.dumps(facts))
    weights = {WEIGHT.format("A"): torch.full((2, 8), seed), WEIGHT.format("B"): torch.ones(6, 2)}
    save_file(weights, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text("# an adapter\n")
    files = {p.name: record_of(p).model_dump() for p in directory.iterdir() if p.name != "run.json"}
    told = {"measured": {"eval_loss": 0.5 + seed}, "data_sha256": f"{int(seed):064x}", "files": files}
    (directory / "run.json").write_text(json.dumps(told | (run or {})))
    return directory


@pytest.fixture
def library(tmp_path):
    return Registry(tmp_path / "home", say=pytest.fail)


@pytest.fixture
def three(library, tmp_path):
    """A library with three versions of `support`, of which the first is tagged."""
    for seed in range(3):
        library.add(adapter(tmp_path / f"run{seed}", seed), "support", "first" if seed == 0 else None)
    return library


def everything(home: Path) -> dict[str, bytes]:
    """All files of a directory, by path."""
    return {str(p.relative_to(home)): p.read_bytes() for p in sorted(home.rglob("*")) if p.is_file()}


# --- names, versions, references


def test_what_is_added_is_found_by_name_hash_and_tag_as_the_files_that_were_given(three, tmp_path):
    for seed, version in enumerate(three.versions("support")):
        for reference in (str(version), *(f"support:{tag}" for tag in version.tags)):
            place = three.resolve(reference)
            for path in (tmp_path / f"run{seed}").iterdir():
                assert (place / path.name).read_bytes() == path.read_bytes()
    assert three.resolve("support") == three.path(three.versions("support")[2])
    assert three.resolve("support:first") == three.path(three.versions("support")[0])


def test_the_same_content_is_one_object_whatever_its_names(library, tmp_path):
    one = library.add(adapter(tmp_path / "a"), "one")
    assert library.add(tmp_path / "a", "one") == one  # already what the name means
    two = library.add(shutil.copytree(tmp_path / "a", tmp_path / "b"), "two")
    assert one.sha256 == two.sha256 and len(library._objects()) == 1
    library.remove("one")
    assert library.resolve("two").is_dir()


def test_a_later_change_where_it_came_from_does_not_reach_the_library(library, tmp_path):
    library.add(adapter(tmp_path / "a"))
    with (tmp_path / "a" / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"x" * 100)
    assert not [each for each in library.verify() if each.bad]


def test_checkpoints_and_logs_of_the_run_stay_behind(library, tmp_path):
    (adapter(tmp_path / "a") / "events.jsonl").write_text("{}")
    adapter(tmp_path / "a" / "checkpoint-3")
    names = {path.name for path in library.path(library.add(tmp_path / "a")).iterdir()}
    run = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "run.json"}
    assert names == run | {"manifest.json", "entry.json"}


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "", ".hidden", "-x", "Upper", "c:x", "a b", "a" * 65, "a\n"])
def test_a_name_or_tag_with_more_than_a_name_in_it_is_refused(name, library, tmp_path):
    adapter(tmp_path / "a")
    for given in ({"name": name}, {"name": "ok", "tag": name}):
        with pytest.raises(AdapterError, match="a name has a-z"):
            library.add(tmp_path / "a", **given)
    for read in (library.find, library.rollback, library.remove, library.restore):
        with pytest.raises(AdapterError):
            read(name)
    assert not (tmp_path / "home" / "objects").exists() or not library._objects()


def test_a_tag_is_on_one_version_and_moves(three):
    second = three.versions("support")[1]
    assert three.tag(str(second), "first").tags == ("first",)
    assert three.find("support:first").number == 2
    assert [version.tags for version in three.versions("support")] == [(), ("first",), ()]


def test_a_path_stays_a_path_and_a_word_that_could_be_both_is_refused(three, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "support")
    assert three.resolve("./support") == Path("./support")
    with pytest.raises(AdapterError, match=r"a name in the library, and a directory here\n  say ./support"):
        three.resolve("support")
    assert three.resolve("run0") == Path("run0")  # no name of the library's
    shutil.rmtree(tmp_path / "support")
    assert three.resolve("support") == three.path(three.find("support"))


def test_what_is_not_there_is_an_error_that_says_what_is(three):
    with pytest.raises(AdapterError, match=r"did you mean support\?"):
        three.resolve("suport")
    with pytest.raises(AdapterError, match="there is support:first"):
        three.resolve("support:last")
    with pytest.raises(AdapterError, match="there is support@"):
        three.resolve("support@0000")
    for path in ("./support", "~nobody/x", "x" * 5000, "a\0b", ""):
        with pytest.raises(AdapterError, match=r"no such directory|not a name"):
            three.resolve(path)


# --- back, away and again


def test_a_rollback_goes_one_version_back_each_time_and_the_first_is_the_last(three):
    assert three.rollback("support").number == 2
    assert three.rollback("support").number == 1
    with pytest.raises(AdapterError, match="no version before support@"):
        three.rollback("support")
    assert three.find("support").number == 1
    newest = three.versions("support")[2]
    assert newest.withdrawn and three.resolve(str(newest)).is_dir()


def test_what_was_rolled_back_is_the_newest_again_when_it_is_added_again(three, tmp_path):
    three.rollback("support")
    assert three.add(tmp_path / "run2", "support").number == 4
    assert three.find("support").number == 4
    assert three.rollback("support").number == 2


def test_what_was_removed_is_restored_as_it_was(three, tmp_path):
    three.rollback("support")
    three.add(tmp_path / "run0", "other")  # shares an object
    before = everything(three.home)
    three.remove("support")
    assert three.names() == ["other"]
    assert len(list((three.home / "trash").iterdir())) == 3  # the list and two objects
    three.restore("support")
    assert everything(three.home) == before


def test_a_name_removed_twice_comes_back_as_what_it_was_last(three, tmp_path):
    three.remove("support")
    three.add(tmp_path / "run1", "support")
    three.remove("support")
    three.restore("support")
    assert [v.sha256 for v in three.versions("support")] == [three.find("support").sha256]
    with pytest.raises(AdapterError, match="is in the library"):
        three.restore("support")


def test_an_emptied_trash_is_an_error_when_something_is_to_come_back(three):
    three.remove("support")
    shutil.rmtree(three.home / "trash")
    with pytest.raises(AdapterError, match="not in the trash"):
        three.restore("support")


# --- what is not taken


def config(**changes):
    def change(directory):
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def unsealed(directory):
    """Without the hashes of run.json, as PEFT itself leaves it."""
    (directory / "run.json").unlink()


def cut(directory):
    unsealed(directory)
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def pickled(directory):
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps({}))


def linked(directory):
    (directory / "README.md").unlink()
    (directory / "README.md").symlink_to("/etc/hostname")


def other_weights(directory):
    save_file({WEIGHT.format("A"): torch.zeros(2, 8)}, directory / "adapter_model.safetensors")


BAD = {
    "no configuration": (lambda d: (d / "adapter_config.json").unlink(), "not a LoRA adapter: it has no adapter_conf"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "it has no adapter_model.safetensors"),
    "a pickle": (pickled, "pickled weights, which can carry code"),
    "half the weights": (cut, "truncated or not a safetensors file"),
    "other weights than the run wrote": (other_weights, "is not what its run wrote"),
    "a file that its run wrote is gone": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a figure that is no number": (lambda d: (d / "run.json").write_text('{"measured": {"loss": NaN}}'), "has a NaN"),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "not LoRA": (config(peft_type="IA3"), "is IA3, only LoRA"),
    "code": (config(auto_mapping=None, arrow_config={"x": 1}), "more than LoRA"),
    "ranks without weights": (config(r=4096), "a rank of 4096"),
    "no base": (config(base_model_name_or_path=None), "names no base model"),
    "a link to elsewhere": (linked, "outside its directory"),
    "run.json of something else": (
        lambda d: (d / "run.json").write_text('{"files": {"../x": 1}}'),
        "run.json: damaged",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_whole_adapter_is_refused_with_its_own_path_and_nothing_is_left(kind, three, tmp_path):
    spoil, said = BAD[kind]
    spoil(adapter(tmp_path / "bad", 7))
    before = everything(three.home)
    with pytest.raises(AdapterError, match=said) as caught:
        three.add(tmp_path / "bad", "support")
    assert str(tmp_path / "bad") in str(caught.value) and "unfinished" not in str(caught.value)
    assert everything(three.home) == before and sorted(os.listdir(three.home)) == ["index.json", "objects"]


def test_a_directory_that_changes_while_it_is_read_is_refused(three, tmp_path, monkeypatch):
    adapter(tmp_path / "a", 7)
    real = durable.new_directory

    def new_directory(place):
        (tmp_path / "a" / "README.md").write_text("# another\n")
        return real(place)

    monkeypatch.setattr(durable, "new_directory", new_directory)
    with pytest.raises(AdapterError, match="changed while it was read"):
        three.add(tmp_path / "a")
    assert three.names() == ["support"] and len(three._objects()) == 3


def test_a_card_that_a_person_wrote_in_is_taken(library, tmp_path):
    (adapter(tmp_path / "a") / "README.md").write_text("# mine\n")
    assert (library.path(library.add(tmp_path / "a")) / "README.md").read_text() == "# mine\n"


# --- damage


def test_an_index_that_is_lost_or_damaged_is_made_again_from_the_adapters_and_nothing_is_missing(three, tmp_path):
    three.tag("support", "prod")
    three.rollback("support")
    three.add(tmp_path / "run1", "other")
    index = three.home / "index.json"
    before = index.read_bytes()
    for damage in (index.unlink, lambda: index.write_bytes(before[:-40]), lambda: index.write_bytes(b"\xff")):
        damage()
        said = []
        again = Registry(three.home, said.append)
        assert again.names() and again.find("support:prod").withdrawn  # reading, it is said and not yet written
        assert len(said) == 1 and "read from the adapters' entries" in said[0]
        assert not [each for each in again.verify() if each.bad]
        assert index.read_bytes() == before


def test_an_adapter_whose_entry_is_lost_with_the_index_gets_a_name(three):
    version = three.find("support")
    (three.path(version) / "entry.json").write_text("{")
    (three.home / "index.json").unlink()
    again = Registry(three.home, print)
    assert again.find(f"recovered-{version.sha256[:12]}").sha256 == version.sha256
    assert len(again.versions("support")) == 2


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda place: flipped(place / "adapter_model.safetensors"), "its SHA-256 differs"),
        (lambda place: (place / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda place: (place / "manifest.json").unlink(), "has no manifest"),
        (shutil.rmtree, "its files are gone"),
        (lambda place: (place / "entry.json").unlink(), "entry.json is not as index.json has it"),
        (lambda place: shutil.copytree(place.with_name("0" * 64), place, dirs_exist_ok=True), "another adapter's"),
    ],
)
def test_verify_names_what_is_damaged_and_adding_it_again_mends_it(damage, said, three, tmp_path):
    place = three.resolve("support")
    shutil.copytree(three.resolve("support:first"), place.with_name("0" * 64))
    damage(place)
    shutil.rmtree(place.with_name("0" * 64))
    bad = [each for each in three.verify() if each.bad]
    assert [each.where for each in bad] == [str(three.find("support"))] and said in bad[0].said
    assert answer("verify", three).status == 1
    three.add(tmp_path / "run2", "support")
    assert not [each for each in three.verify() if each.bad] and answer("verify", three).status == 0
    assert len(three.versions("support")) == 3


def test_verify_says_whether_the_base_here_is_the_one_it_was_trained_on(library, tmp_path):
    from qlora.config import ModelConfig
    from qlora.model.source import open_source

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"w": torch.zeros(4)}, base / "model.safetensors")
    known = {"base": {"fingerprint": open_source(ModelConfig(model_name_or_path=str(base))).fingerprint()}}
    library.add(adapter(tmp_path / "a", run=known, base_model_name_or_path=str(base)))
    assert [(each.said, each.bad) for each in library.verify()] == [
        ("whole; the base is the one it was trained on", False)
    ]
    save_file({"w": torch.ones(4)}, base / "model.safetensors")
    (found,) = library.verify("a")
    assert found.bad and f"the base here is not the one it was trained on: {base}" in found.said
    shutil.rmtree(base)
    (found,) = library.verify("a")
    assert not found.bad and "not here to compare" in found.said


def test_verify_looks_whether_an_adapter_from_elsewhere_fits_the_base_here(library, tmp_path, checkpoint):
    base = checkpoint("llama")
    for name, shape in (("fits", (2, 64)), ("narrow", (2, 48)), ("deep", (2, 64))):
        directory = adapter(tmp_path / name, base_model_name_or_path=str(base))
        layer = "9" if name == "deep" else "0"
        weights = {WEIGHT.format(side).replace("0", layer): torch.ones(shape) for side in "A"}
        save_file(weights, directory / "adapter_model.safetensors")
        (directory / "run.json").unlink()
        library.add(directory)
    found = {each.where.partition("@")[0]: each for each in library.verify()}
    assert [found[name].bad for name in ("fits", "narrow", "deep")] == [False, True, True]
    assert "fits the base by names and shapes" in found["fits"].said
    assert "layers.0.mlp.up_proj is [128, 64], the adapter's A there [2, 48]" in found["narrow"].said
    assert f"another base than {base}, which has no model.layers.9.mlp.up_proj" in found["deep"].said


def test_a_base_named_from_where_it_was_trained_is_found_from_anywhere(library, tmp_path, checkpoint, monkeypatch):
    shutil.copytree(checkpoint("llama"), tmp_path / "there" / "models" / "base")
    directory = adapter(tmp_path / "a", base_model_name_or_path="models/base")
    assert library.add(directory).base == ""
    monkeypatch.chdir(tmp_path / "there")
    version = library.add(directory)  # the same, from where its base can be seen
    base = str(tmp_path / "there" / "models" / "base")
    assert version.number == 1 and version.base == base
    monkeypatch.chdir(tmp_path)
    assert recipe_of(library.path(version)).model.model_name_or_path == base
    assert recipe_of(directory).model.model_name_or_path == "models/base"
    (found,) = library.verify()
    assert "not here" not in found.said
    (library.home / "index.json").unlink()
    assert Registry(library.home).find("a").base == base


# --- several at once, and death at any moment


def add_all(home, directories, name, barrier):
    barrier.wait()
    for directory in directories:
        Registry(home).add(directory, name)


def test_two_processes_that_write_at_once_both_get_all_of_theirs_in(tmp_path):
    runs = [adapter(tmp_path / f"run{seed}", seed) for seed in range(6)]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [
        context.Process(target=add_all, args=(tmp_path / "home", part, "shared", barrier))
        for part in (runs[::2], runs[1::2])
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    library = Registry(tmp_path / "home", say=pytest.fail)
    assert [process.exitcode for process in both] == [0, 0]
    assert [version.number for version in library.versions("shared")] == [1, 2, 3, 4, 5, 6]
    assert not [each for each in library.verify() if each.bad]


def test_a_library_that_another_holds_is_waited_for_and_then_an_error_that_says_who(three, monkeypatch):
    lock = Lock(three.home)
    waiting = threading.Timer(0.7, lock.release)
    waiting.start()
    assert three.rollback("support").number == 2
    waiting.join()
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    with Lock(three.home), pytest.raises(AdapterError, match=rf"process {os.getpid()} on .* is writing to it"):
        three.rollback("support")
    assert three.find("support").number == 2  # to read, nobody waits


def state(library: Registry) -> list:
    """All versions, but for when."""
    versions = (version for name in library.names() for version in library.versions(name))
    return [(v.name, v.number, v.sha256, v.tags, v.withdrawn is not None) for v in versions]


ACTIONS = {
    "add": lambda library, place: library.add(place / "run9", "support"),
    "rm": lambda library, place: library.remove("support"),
    "restore": lambda library, place: library.restore("gone"),
    "rollback": lambda library, place: library.rollback("support"),
    "tag": lambda library, place: library.tag("support", "first"),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A library to copy, and what is to be added."""
    place = tmp_path_factory.mktemp("prepared")
    library = Registry(place / "home", say=pytest.fail)
    for seed, name in enumerate(("support", "support", "gone", "other")):
        library.add(adapter(place / f"run{seed}", seed), name, "first" if seed == 0 else None)
    library.add(place / "run0", "other")
    library.remove("gone")
    adapter(place / "run9", 9)
    return place


@pytest.mark.torture
@pytest.mark.parametrize("fault", [full, die], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_fault_at_any_call_leaves_the_library_before_or_after_it_and_whole(action, fault, prepared, tmp_path, times):
    def copied(name):
        return Registry(shutil.copytree(prepared / "home", tmp_path / name), say=pytest.fail)

    before = state(copied("before"))
    done = copied("done")
    with Calls().heard() as counted:
        ACTIONS[action](done, prepared)
    after = state(done)
    assert before != after and {"open", "write", "fsync", "replace"} <= {*counted.names}
    seen = set()
    for at in range(0, len(counted.names), times(3, 1)):
        library = copied(f"{at}")

        def attempt(library=library, at=at):
            with Calls(at, fault).heard():
                ACTIONS[action](library, prepared)

        if fault is die:
            assert in_a_child(attempt) in (0, 9)
        else:
            with suppress(MachineError):
                attempt()
        found = state(library)
        assert found in (before, after)
        seen.add(found == after)
        library.add(prepared / "run3", "next")  # whatever was left is cleared away, and the next write is whole
        assert not [each for each in library.verify() if each.bad]
        assert [each for each in state(library) if each[0] != "next"] == found
        names = {path.name for folder in (library.home, library.home / "objects") for path in folder.iterdir()}
        assert not [name for name in names if name.startswith(".")]
        index = (library.home / "index.json").read_bytes()
        (library.home / "index.json").unlink()
        assert state(Registry(library.home)) == state_of(index)  # the entries know it too
        shutil.rmtree(library.home)
    assert seen == {False, True}


def state_of(index: bytes) -> list:
    versions = json.loads(index)["versions"]
    return [
        (v["name"], v["number"], v["sha256"], tuple(v["tags"]), v["withdrawn"] is not None)
        for v in sorted(versions, key=lambda v: (v["name"], v["number"]))
    ]


def test_what_a_full_disk_stops_is_a_machine_error_with_the_numbers(three, tmp_path):
    before = everything(three.home)
    adapter(tmp_path / "a", 7)
    with Calls(6, full).heard() as calls, pytest.raises(MachineError, match=r"No space left .*needs .* are free"):
        three.add(tmp_path / "a")
    assert len(calls.names) > 6 and everything(three.home) == before


def churn(home: Path, place: Path) -> None:
    """Write without an end."""
    library = Registry(home)
    while True:
        for seed in (3, 9):
            library.add(place / f"run{seed}", "busy", f"t{seed}")
        library.rollback("busy")
        library.remove("busy")
        library.restore("busy")
        library.remove("busy")


def test_a_writer_that_is_killed_at_random_moments_20_times_leaves_a_library_that_is_whole(prepared, tmp_path):
    home = shutil.copytree(prepared / "home", tmp_path / "home")
    others = [each for each in state(Registry(home)) if each[0] != "busy"]
    moments = random.Random(0)
    for _ in range(20):
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                churn(home, prepared)
            os._exit(1)
        time.sleep(moments.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        library = Registry(home, say=pytest.fail)
        assert [each for each in state(library) if each[0] != "busy"] == others
        library.tag("support", "seen")
        library.tag("support:seen", "first")  # a write clears away what was left
        assert not [each for each in library.verify() if each.bad]
        others = [each for each in state(library) if each[0] != "busy"]


# --- lineage, and what people see


def lineage(library, tmp_path):
    """`support`, and `legal`, which was continued from it under another learning rate."""
    recipe = "data: {datasets: [{path: rows.jsonl}]}\nmodel: {model_name_or_path: user/base}\n"
    (adapter(tmp_path / "support") / "recipe.yaml").write_text(recipe)
    weights = hashlib.sha256((tmp_path / "support" / "adapter_model.safetensors").read_bytes()).hexdigest()
    parent = library.add(tmp_path / "support", tag="prod")
    (adapter(tmp_path / "legal", 1, {"continued_from": weights}) / "recipe.yaml").write_text(
        recipe + "training: {learning_rate: 1e-5}\n"
    )
    return parent, library.add(tmp_path / "legal")


def test_the_lineage_names_base_data_figures_the_adapter_before_and_what_changed_in_the_recipe(library, tmp_path):
    parent, version = lineage(library, tmp_path)
    assert library.parent(library.facts(version)) == parent
    told = answer("log", library, "legal")
    text = "\n".join(told.lines)
    assert f"continued  from {parent}" in text and "base       user/base" in text and f"{1:064x}" in text
    assert re.search(r"training\.learning_rate: 0\.0002 -> 1e-05", text) and "eval_loss 1.5" in text
    assert told.value[0]["parent"] == str(parent)
    library.remove("support")
    assert "not in the library" in "\n".join(answer("log", library, "legal").lines)


@pytest.mark.parametrize(
    "words", [["list"], ["show", "legal"], ["log", "legal"], ["verify"], ["diff", "support", "legal"]]
)
def test_what_is_shown_fits_80_columns_and_is_json_for_programs(words, library, tmp_path):
    lineage(library, tmp_path)
    found = answer(words[0], library, *words[1:])
    assert found.lines and all(len(line) <= 80 or len(line.split()) <= 2 for line in found.lines)  # a path is whole
    assert json.loads(json.dumps(found.value, allow_nan=False))


def test_no_secret_and_no_control_character_is_shown(library, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuv")
    base = "user/base\x1b[31m?token=hf_abcdefghijklmnopqrstuv"
    library.add(adapter(tmp_path / "a", base_model_name_or_path=base))
    for words in (["list"], ["show", "a"], ["log", "a"], ["verify"]):
        found = answer(words[0], library, *words[1:])
        text = "\n".join(found.lines)
        assert "base" in text and "hf_abc" not in text + json.dumps(found.value) and "\x1b" not in text


def test_what_run_json_says_may_be_of_any_kind(library, tmp_path):
    measured = {"a": 1e999, "b": 10**400, "c": True, "d": [2, {"e": 3.5}], "f": "text", "g": None}
    run = {"measured": measured, "data_sha256": 5, "base": [], "versions": 7, "continued_from": {}}
    version = library.add(adapter(tmp_path / "a", run=run, target_modules="all-linear", revision=3))
    facts = library.facts(version)
    assert facts.measured == {"d.0": 2, "d.1.e": 3.5} and facts.targets == ("all-linear",)
    assert (facts.data_sha256, facts.base_fingerprint, facts.versions, facts.parent_weights) == (None, None, {}, None)
    for words in (["list"], ["show", "a"], ["log", "a"], ["verify"], ["diff", "a", "a"]):
        assert json.dumps(answer(words[0], library, *words[1:]).value, allow_nan=False)


def test_an_adapter_whose_files_are_gone_spoils_no_list(three, tmp_path):
    three.add(tmp_path / "run0", "other")
    shutil.rmtree(three.resolve("support"))
    lines = answer("list", three).lines
    assert any("its files are gone" in line for line in lines) and any("eval_loss 0.5" in line for line in lines)
