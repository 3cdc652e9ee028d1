"""`qlora export`: an adapter in the forms that others take, each made whole or not at all.

peft        the adapter as PEFT, vLLM and transformers load it       <out>/peft/
merged      one 16-bit model, with a certificate of what it lost     <out>/merged/
gguf        the same as one file for llama.cpp                       <out>/<name>-f16.gguf
gguf-lora   the adapter alone for llama.cpp, on the base's .gguf     <out>/<name>-lora.gguf
            or on the base as it was trained: --weights dequantized  <out>/base-f16.gguf
ollama      a Modelfile over one of the last two                     <out>/Modelfile

What is made from an adapter is checked before anything is written: that its files are what its run wrote (its card and
recipe aside, which people edit), that nothing stands in its way, that its base is there, is the one that it was
trained on, and has the shapes that it fits. `verify` then asks each of them what `qlora.verified` says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora import durable, verified
from qlora.config import Config
from qlora.data import chat
from qlora.data.prepare import prepare
from qlora.data.source import read_splits
from qlora.errors import AdapterError, DataError, MachineError, ModelError
from qlora.evaluate.generation import evaluating
from qlora.export import gguf, llama_cpp, ollama, push
from qlora.export.certificate import Certificate, export_merged
from qlora.export.merge import Merged
from qlora.export.peft import export_peft
from qlora.export.writing import write
from qlora.library.facts import CONFIG, RECIPE, RUN, read_facts
from qlora.library.files import check_recorded
from qlora.live import recipe_of, tokenizer_of
from qlora.machine import free_bytes, pick_device
from qlora.model.adapters import load_adapter, read_config, refuse_misfit
from qlora.model.batch import Batch
from qlora.model.gguf_header import check_gguf
from qlora.model.load import load_base
from qlora.model.source import Source, open_source
from qlora.train.step import choose

KINDS = ("peft", "merged", "gguf", "gguf-lora", "ollama")
_ADVICE = "give --out a directory on a disk with more room"
_NO_MODEL = (
    "ollama: needs a model as .gguf\n  --to gguf ollama, or --to gguf-lora ollama: on a base that is a .gguf file, or"
    " with --weights dequantized"
)


def export(
    adapter: Path,
    kinds: Sequence[str],
    out: Path,
    *,
    name: str | None = None,
    weights: Literal["auto", "original", "dequantized"] = "auto",
    gguf_type: gguf.Kind = "f16",
    base: str | None = None,
    force: bool = False,
    verify: bool = False,
    push_to: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write an adapter to `out` in each of the forms.

    adapter            a directory that `train` left, or any PEFT LoRA directory
    name               of the files; None: the directory's
    weights            what the adapter is merged into; see `export_merged`. gguf-lora: dequantized writes the base so
    base               where the base lies now, instead of where the recipe says
    force              export what is not true to the adapter too, and for another base than it was trained on
    verify             ask each of them the held-out questions, beside the live adapter; <out>/verified.json has it all
    push_to            `user/repo` of a hub, to which all that was written goes in one commit
    trust_remote_code  run Python code that ships with the base

    Raises AdapterError, DataError, ModelError or MachineError; what was written before is whole.
    """
    if push_to is not None:
        push.check(push_to)
    _check_whole(adapter)
    config = recipe_of(adapter, trust_remote_code)
    if base is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"model_name_or_path": base})})
    source = _base_of(adapter, config, force)
    tokenizer = tokenizer_of(adapter, source, config)
    name = name or adapter.resolve().name
    it = _Export(adapter, tuple(kinds), out, name, config, source, tokenizer, weights, gguf_type, force, say)
    it.check_places()
    questions = it.questions() if verify else []
    made = it.write()
    if verify:
        it.verify(questions)
    if push_to is not None:
        say(f"pushed      {push.push(push.files_of(made, adapter / 'README.md'), push_to)}")


@dataclass(frozen=True, slots=True)
class _Export:
    """An adapter on its way out. config: the recipe that it was trained by; the rest as `export` has it."""

    adapter: Path
    kinds: tuple[str, ...]
    out: Path
    name: str
    config: Config
    source: Source
    tokenizer: Any
    weights: Literal["auto", "original", "dequantized"]
    gguf_type: gguf.Kind
    force: bool
    say: Callable[[str], None]

    # Where things lie

    @property
    def peft(self) -> Path:
        return self.out / "peft"

    @property
    def merged(self) -> Path:
        return self.out / "merged"

    @property
    def model(self) -> Path:
        """The merged model for llama.cpp."""
        return self.out / f"{self.name}-{self.gguf_type}.gguf"

    @property
    def lora(self) -> Path:
        return self.out / f"{self.name}-lora.gguf"

    @property
    def beneath(self) -> Path | None:
        """The base for llama.cpp: its own file, or as it was trained, which is written; None where there is neither."""
        return self.out / f"base-{self.gguf_type}.gguf" if self.weights == "dequantized" else self.source.gguf

    def check_places(self) -> None:
        """Raises AdapterError where nothing can be written, where it would stand in place of what it is made from, or
        where a Modelfile would have no model."""
        if self.out.exists() and not self.out.is_dir():
            raise AdapterError(f"--out {self.out}: is a file; give a directory")
        writes = {"peft": self.peft, "merged": self.merged, "gguf": self.model, "gguf-lora": self.lora}
        places = [place for kind, place in writes.items() if kind in self.kinds]
        if "gguf-lora" in self.kinds and self.weights == "dequantized" and self.beneath is not None:
            places.append(self.beneath)
        sources = {"adapter": self.adapter, "base": self.source.gguf or self.source.directory}
        for what, source in sources.items():
            if taken := next((place for place in places if place.resolve() == source.resolve()), None):
                raise AdapterError(f"{taken}: is the {what} itself; give another place with --out")
        base, lora = self._named()
        ready = base is not None and (lora is None or "gguf-lora" in self.kinds or lora.is_file())
        if "ollama" in self.kinds and not ready:
            raise AdapterError(_NO_MODEL)

    # What is made

    def write(self) -> list[Path]:
        """Make what was asked for, what others are made of first. Returns what can be given to others."""
        made: list[Path] = []
        certificate: Certificate | None = None
        if "peft" in self.kinds:
            export_peft(self.adapter, self.peft, self.tokenizer, self.name)
            made.append(self._said("peft", self.peft))
        if "merged" in self.kinds:
            certificate = self._merge(self.merged)
            made.append(self._said("merged", self.merged))
        if "gguf" in self.kinds:
            with self._scratch() as scratch:
                whole = self.merged if certificate else scratch / "merged"
                certificate = certificate or self._merge(whole)
                self._write_gguf(whole, self.model)
            made.append(self._said("gguf", self.model))
        if "gguf-lora" in self.kinds:
            gguf.write_gguf_lora(self.adapter, self.lora, self.source)
            made.append(self._said("gguf-lora", self.lora))
            if self.weights == "dequantized" and self.beneath is not None:
                self._write_base(self.beneath)
                made.append(self._said("", self.beneath))
        if "ollama" in self.kinds:
            path, base = self._write_modelfile()
            self._said("ollama", path)
            made += [path] if base.parent == self.out else []  # else it names a file of this machine
        if certificate is not None and "peft" in self.kinds:  # its card says what merging it came to
            export_peft(self.adapter, self.peft, self.tokenizer, self.name, certificate)
        return made

    def _said(self, kind: str, path: Path) -> Path:
        self.say(f"{kind:<12}{path}")
        return path

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise durable.disk_error(self.out, error, 0, _ADVICE) from error
        with tempfile.TemporaryDirectory(dir=self.out, prefix=".export.", suffix=".unfinished") as place:
            try:
                yield Path(place)
            except MachineError as error:  # of a place that is gone by now
                raise MachineError(str(error).replace(str(Path(place).absolute()), str(self.out))) from error

    def _merge(self, place: Path) -> Certificate:
        return export_merged(
            self.adapter,
            place,
            config=self.config,
            source=self.source,
            tokenizer=self.tokenizer,
            batches=self._held_out(),
            device=pick_device(),
            weights=self.weights,
            force=self.force,
            say=self.say,
        )

    def _held_out(self) -> list[Batch]:
        """The held-out rows of the adapter's recipe, where they are still to be had."""
        if not (self.adapter / RECIPE).is_file():
            return []
        try:
            data = prepare(self.config, self.source.tokenizer(self.config.model.trust_remote_code))
            batches = data.held_out_batches(False)
            return [batches[i] for i in range(len(batches))]
        except DataError as error:
            self.say(f"the recipe's rows cannot be read: {error}")
            return []

    def _write_gguf(self, whole: Path, place: Path) -> None:
        end = next(iter(chat.end_token_ids(self.tokenizer)), None)
        gguf.write_gguf(whole, place, self.gguf_type, base_gguf=self.source.gguf, eos_token_id=end)

    def _write_base(self, place: Path) -> None:
        """The base in the four-bit weights that training saw; it serves all adapters that were trained on them."""
        with self._scratch() as scratch:
            base = Merged(None, self.source, self.config, "dequantized", pick_device())
            write(base, scratch / "base", self.tokenizer.save_pretrained)
            self._write_gguf(scratch / "base", place)

    def _write_modelfile(self) -> tuple[Path, Path]:
        """A Modelfile, and the model that it names."""
        base, lora = self._named()
        assert base is not None  # `check_places`
        template, stops, _ = _template(base, self.tokenizer)
        named = base.name if base.parent == self.out else str(base.resolve())
        adapter = lora.name if lora is not None else None
        return ollama.write_modelfile(self.out, named, adapter=adapter, template=template, stops=stops), base

    def _named(self) -> tuple[Path | None, Path | None]:
        """What a Modelfile names: the merged model, or the base's .gguf and the adapter's. Of two, what is made now."""
        merged = "gguf" in self.kinds or ("gguf-lora" not in self.kinds and self.model.is_file())
        return (self.model, None) if merged else (self.beneath, self.lora)

    # What they are asked

    def questions(self) -> list[verified.Question]:
        """The held-out questions. Raises what stands in the way of asking them, before anything is written."""
        llama = {"gguf", "gguf-lora"} & set(self.kinds)
        if llama:
            llama_cpp.check_installed()
        if "gguf-lora" in self.kinds and self.beneath is None:
            raise AdapterError(
                f"{self.adapter}: gguf-lora cannot be verified: its base is no .gguf file, and llama.cpp needs one to"
                " put it on\n  --weights dequantized writes the base as it was trained"
            )
        if not (self.adapter / RECIPE).is_file():
            raise DataError(
                f"{self.adapter}: has no {RECIPE}, whose held-out rows --verify would ask\n  export it without --verify"
            )
        try:
            held_out = read_splits(self.config.data, seed=self.config.training.seed)[1].conversations
        except DataError as error:
            raise DataError(
                f"{self.adapter}: --verify asks the held-out rows of its recipe, and they are gone: {error}"
            ) from error
        return verified.questions(held_out, self.tokenizer, self.adapter)

    def verify(self, questions: Sequence[verified.Question]) -> None:
        """Raises AdapterError where an export is not the adapter that was trained."""
        device, training = pick_device(), self.config.training
        base = load_base(self.config, self.source, device, self.say)
        live: Any = load_adapter(base.model, str(self.adapter))
        step = choose(base.model, device, self.config.memory, training.seed, ".", say=lambda text: None)
        with evaluating(live), step.whole_model(free_bytes(device) / 2):
            ends, most = chat.end_token_ids(self.tokenizer), training.generation_max_length
            asked = verified.Asked(questions, live, self.tokenizer, ends, most, training.per_device_eval_batch_size)
            found = [self._asked(kind, asked) for kind in KINDS if kind in self.kinds]
        problems = verified.report(asked, found, self.say)
        content = verified.figures(asked, found, problems).encode()
        try:
            durable.replace_file(self.out / verified.FILE, content)
        except OSError as error:
            raise durable.disk_error(self.out, error, len(content), _ADVICE) from error
        if problems:
            lines = [f"  {kind}: {problem}" for kind, each in problems.items() for problem in each]
            raise AdapterError(f"{self.out}: not the adapter that was trained:\n" + "\n".join(lines))

    def _asked(self, kind: str, asked: verified.Asked) -> verified.Verified:
        """How one export does."""
        sixteen = self.gguf_type != "q8_0"
        match kind:
            case "peft":
                with verified.plain_peft(self.peft, self.config, self.source, pick_device()) as plain:
                    runs = asked.by_transformers(plain, self.peft)
                by = f"transformers, {'bitsandbytes, ' if self.config.method == 'qlora' else ''}peft"
                return asked.compared(kind, by, runs, True)
            case "merged":
                with verified.plain(self.merged, pick_device()) as plain:
                    runs = asked.by_transformers(plain, self.merged)
                return asked.compared(kind, "transformers", runs, True)
            case "gguf":
                runs = llama_cpp.run(self.model, asked.answers, asked.ends)
                return asked.compared(kind, "llama.cpp", runs, sixteen)
            case "gguf-lora":
                assert self.beneath is not None
                runs = llama_cpp.run(self.beneath, asked.answers, asked.ends, lora=self.lora)
                same = sixteen and self.weights == "dequantized"
                return asked.compared(kind, f"llama.cpp on {self.beneath.name}", runs, same)
            case _:
                model, _ = self._named()
                assert model is not None
                return asked.modelfile(self.out / ollama.FILE, *_template(model, self.tokenizer))


def _check_whole(adapter: Path) -> None:
    """Raises AdapterError for what is no adapter, or is not what its run wrote."""
    if not (adapter / CONFIG).is_file():
        whole = (adapter / RUN).is_file() and (adapter / "config.json").is_file()
        raise AdapterError(
            f"{adapter}: every weight was trained: it is a whole model already, as transformers loads it"
            if whole
            else f"{adapter}: no adapter there (it has no {CONFIG}); a run that died has none yet"
        )
    check_recorded(adapter)


def _base_of(adapter: Path, config: Config, force: bool) -> Source:
    """The adapter's base. Raises ModelError where it is not there, AdapterError where it is another one."""
    try:
        source = open_source(config.model)
    except ModelError as error:
        raise ModelError(f"{adapter}: its base cannot be opened: {error}\n  --base says where it lies now") from error
    read_config(adapter)
    refuse_misfit(adapter, source, config.model.trust_remote_code)
    expected = read_facts(adapter).base_fingerprint
    if expected and expected != source.fingerprint() and not force:
        raise AdapterError(
            f"{adapter}: was trained on other weights than those of {source.name}: another revision, model or file"
            "\n  give the right ones with --base, or --force to put it on these"
        )
    return source


def _template(model: Path, tokenizer: Any) -> tuple[ollama.GoTemplate | None, list[str], str]:
    """The tokenizer's template for Ollama, the texts that end an answer, and the BOS that it puts before a prompt."""

    def ask(messages: Sequence[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    adds = check_gguf(model).get("tokenizer.ggml.add_bos_token", tokenizer("")["input_ids"] == [tokenizer.bos_token_id])
    bos = str(tokenizer.bos_token) if adds else ""
    stops = [str(tokenizer.convert_ids_to_tokens(end)) for end in chat.end_token_ids(tokenizer)]
    return ollama.go_template(ask, stops[0], bos) if tokenizer.chat_template and stops else None, stops, bos
