"""The command line: it reads arguments and calls; all logic is elsewhere."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from qlora.errors import QLoRAError
from qlora.redact import redact

_BENCH = ("run", "report", "compare", "schema")  # what `bench` can be told to do; without a word of these, the first


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    0, 1 after an error that the user can mend, 70 after one of ours (with its traceback), 130 after an interrupt.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["bench"] and not {*words[1:2]} & {"-h", "--help", *_BENCH}:
        words.insert(1, _BENCH[0])
    options = _parser().parse_args(words)
    try:
        return options.command(options)
    except QLoRAError as error:
        print(redact(error.report()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `qlora data ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # a bug; Python would print the same, with the secrets that its messages quote
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        return 70


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qlora", description="Fine-tune language models on consumer GPUs.")
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _with_recipe(commands.add_parser("train", help="fine-tune as a recipe says"))
    going_on = train.add_mutually_exclusive_group()
    going_on.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    going_on.add_argument("--overwrite", action="store_true", help="remove what an earlier run left in output_dir")
    _add_skip(train)
    train.set_defaults(command=_train)

    data = _with_recipe(commands.add_parser("data", help="show what a recipe's data is and what is learned of it"))
    _add_skip(data)
    data.add_argument("--samples", type=int, default=3, metavar="N", help="rows to show in full (%(default)s)")
    data.set_defaults(command=_data)

    plan = _with_recipe(
        commands.add_parser("plan", help="say what a recipe takes and how fast it is, before anything is loaded"), "?"
    )
    plan.add_argument("--model", metavar="ID", help="another base: a hub id, a directory, a .gguf or config.json file")
    plan.add_argument("--max-seq-length", type=int, metavar="N", help="other sequences: of at most N tokens")
    plan.add_argument(
        "--card", metavar="NAME", help="plan for a machine with that card, e.g. rtx4090; without, this one"
    )
    plan.add_argument("--vram", type=float, metavar="GIB", help="plan for a machine with a card of so much memory")
    plan.add_argument("--host-ram", type=float, metavar="GIB", help="memory of that machine itself (32)")
    plan.add_argument("--json", action="store_true", dest="as_json", help="print all of the plan, for programs")
    plan.set_defaults(command=_plan, misused=plan.error)

    runs = commands.add_parser("runs", help="list runs: finished, running, stopped or died, and how to go on")
    runs.add_argument("directories", nargs="*", metavar="DIR", help="where to look, and in all below (outputs)")
    runs.add_argument("--json", action="store_true", dest="as_json", help="print all of it, for programs")
    runs.set_defaults(command=_runs)

    doctor = commands.add_parser("doctor", help="say what this machine can train and what is wrong with its set-up")
    doctor.add_argument("--measure", action="store_true", help="find out how fast it is, under a minute, and keep that")
    doctor.set_defaults(command=_doctor)

    _add_bench(commands.add_parser("bench", help="measure VRAM and speed of ours and others doing the same work"))

    generate = commands.add_parser("generate", help="answer a prompt with a trained adapter")
    generate.add_argument("adapter", help="directory that `qlora train` left, any PEFT LoRA, or a name in the library")
    generate.add_argument("prompt", help="what the user says; - reads it from standard input")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most (%(default)s)")
    generate.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that ships with the base; it can do anything"
    )
    generate.set_defaults(command=_generate)

    _add_export(commands.add_parser("export", help="write an adapter as PEFT, one merged model, GGUF or for Ollama"))
    _add_adapters(commands.add_parser("adapters", help="keep adapters by name: versions, tags, lineage, differences"))
    _add_chat(commands.add_parser("chat", help="talk with adapters on one base, and compare what they say"))
    _add_serve(commands.add_parser("serve", help="answer as OpenAI's chat API does; `model` names the adapter"))

    schema = commands.add_parser("schema", help="print the JSON Schema of recipes")
    schema.set_defaults(command=_schema)
    return parser


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("adapter", help="a run's directory, any PEFT LoRA, or a name in the library")
    export.add_argument("--to", nargs="+", required=True, choices=_EXPORTS, metavar="KIND", help=", ".join(_EXPORTS))
    export.add_argument("--out", metavar="DIR", help="where to (exports/<name of the adapter>)")
    export.add_argument(
        "--weights",
        choices=("auto", "original", "dequantized"),
        default="auto",
        help="what to merge into: the 16-bit base, or what training saw of it; auto measures both (%(default)s);"
        " gguf-lora: dequantized writes the base as it was trained too",
    )
    export.add_argument("--gguf-type", choices=("f16", "bf16", "q8_0"), default="f16", help="of matrices (%(default)s)")
    export.add_argument(
        "--verify", action="store_true", help="load each export anew, and ask it the held-out questions"
    )
    export.add_argument(
        "--push",
        metavar="USER/REPO",
        help="upload it to the hub, private where it is new; needs a token: `hf auth login`, or HF_TOKEN",
    )
    export.add_argument("--force", action="store_true", help="even where the merged model is not true to the adapter")
    _add_base(export)
    export.set_defaults(command=_export)


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="ID", help="where the base model lies now, instead of where the adapter says")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that ships with the base; it can do anything"
    )


def _add_adapters(adapters: argparse.ArgumentParser) -> None:
    kinds = adapters.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="action")
    for action, said, words in (
        ("list", "all names, with their newest version", ()),
        ("show", "one adapter: base, data, how good", ("NAME",)),
        ("add", "take an adapter in, as a new version where the name is there", ("DIR",)),
        ("tag", "mark a version", ("NAME", "TAG")),
        ("log", "where it comes from: base, data, adapters before it, figures", ("NAME",)),
        ("diff", "two adapters: recipe, data, figures, change of the weights by layer", ("A", "B")),
        ("rollback", "let the name mean the version before", ("NAME",)),
        ("rm", "put it into the trash", ("NAME",)),
        ("restore", "take it back out of the trash", ("NAME",)),
        ("verify", "check every file against its SHA-256", ("[NAME]",)),
    ):
        parser = kinds.add_parser(action, help=said)
        for word in words:
            name = word.strip("[]")
            parser.add_argument(f"word_{name}", metavar=name, nargs=None if name == word else "?")
        if action == "add":
            parser.add_argument("--name", help="in the library (the directory's)")
            parser.add_argument("--tag", help="mark this version")
        parser.add_argument("--json", action="store_true", dest="as_json", help="print it for programs")
    adapters.set_defaults(command=_adapters)

    combine = kinds.add_parser("combine", help="several adapters as one, and what each task loses by it")
    combine.add_argument(
        "words", nargs="+", metavar="NAME[:WEIGHT]", help="names or directories; a weight left out is 1"
    )
    combine.add_argument(
        "--method", default="cat", help="cat, svd, linear, ties, dare_ties, ... as PEFT has them (%(default)s)"
    )
    combine.add_argument(
        "--density", type=float, help="share of the values that ties, dare and prune methods keep (0.5)"
    )
    combine.add_argument("--rank", type=int, metavar="N", help="of what comes of it, for methods that end in svd")
    combine.add_argument("--seed", type=int, metavar="N", help="of what a dare method drops (0)")
    meet = kinds.add_parser("interference", help="how adapters meet, in their weights and on each one's held-out rows")
    meet.add_argument("words", nargs="+", metavar="NAME", help="names or directories")
    for parser in (combine, meet):
        parser.add_argument(
            "--out", required=parser is combine, metavar="DIR", type=Path, help="a directory to be made"
        )
        parser.add_argument(
            "--no-eval", action="store_false", dest="evaluate", help="the weights alone: the base is not loaded"
        )
        parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that ships with the base")
        parser.set_defaults(command=_combine)


def _add_chat(chat: argparse.ArgumentParser) -> None:
    _add_voices(chat)
    chat.add_argument("--system", metavar="TEXT", help="system turn of every conversation")
    chat.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (%(default)s)")
    chat.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest (%(default)s)")
    chat.add_argument("--seed", type=int, metavar="N", help="of the draw, above temperature 0")
    chat.set_defaults(command=_chat)


def _add_serve(serve: argparse.ArgumentParser) -> None:
    _add_voices(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="(%(default)s)")
    serve.add_argument("--api-key", metavar="KEY", help="what clients have to show; better in $QLORA_API_KEY")
    serve.set_defaults(command=_serve)


def _add_voices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        dest="adapters",
        help="directory, or name in the library; may be repeated",
    )
    _add_base(parser)


_EXPORTS = ("peft", "merged", "gguf", "gguf-lora", "ollama")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    kinds = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run = kinds.add_parser("run", help="run a suite; `run` may be left out")
    run.add_argument(
        "suite", nargs="?", help="a name in benchmarks/suites, or a YAML file (cpu; throughput with a GPU)"
    )
    for option, metavar, said in (
        ("--model", "ID,..", "hub ids, directories or .gguf files, instead of the suite's"),
        ("--shape", "NAME,..", "models of random weights, e.g. llama-8b, instead of the suite's"),
        ("--methods", "NAME,..", "of qlora, lora, full, hf-qlora, hf-lora, unsloth, torchtune, llama-factory"),
        ("--work", "KxT,..", "micro-batches x tokens of a step, or micro-batches x rows x tokens"),
        ("--r", "N,..", "ranks of the adapter"),
        ("--vram", "GIB,..", "memory that a process may take, to act as a smaller card"),
    ):
        run.add_argument(option, metavar=metavar, type=lambda text: text.split(","), help=said)
    run.add_argument("--recipe", metavar="FILE", help="train on that recipe's rows; without, on random tokens")
    run.add_argument("--optim", metavar="NAME", help="optimizer of every method")
    run.add_argument("--search", choices=("context", "model"), help="look for the longest or largest that trains")
    run.add_argument("--steps", type=int, metavar="N", help="timed steps")
    run.add_argument("--predict", action="store_true", default=None, help="say what `qlora plan` says beside it")
    run.add_argument("--out", metavar="FILE", help="JSON (benchmarks/results/<suite>_<device>_<date>.json)")
    run.set_defaults(command=_bench)

    report = kinds.add_parser("report", help="tables and a page of results")
    report.add_argument("files", nargs="+", metavar="FILE", help="JSON files that `qlora bench` left")
    report.add_argument(
        "--out", metavar="STEM", help="write STEM.md and STEM.html (beside the first file, by its name)"
    )
    report.set_defaults(command=_bench_report)

    compare = kinds.add_parser("compare", help="compare two results; exits with 1 where the newer is worse")
    compare.add_argument("old", metavar="OLD", help="JSON file")
    compare.add_argument("new", metavar="NEW", help="JSON file")
    compare.add_argument("--threshold", default="5%", metavar="SHARE", help="how much worse is tolerated (%(default)s)")
    compare.set_defaults(command=_bench_compare)

    schema = kinds.add_parser("schema", help="print the JSON Schema of results")
    schema.set_defaults(command=_bench_schema)


def _add_skip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-bad-rows",
        action="append_const",
        const="data.skip_bad_rows=true",
        dest="overrides",
        help="leave out the rows that are wrong, and say how many they are, instead of refusing them all",
    )


def _with_recipe(parser: argparse.ArgumentParser, nargs: str | None = None) -> argparse.ArgumentParser:
    parser.add_argument("recipe", nargs=nargs, help="a YAML file; `qlora schema` says what may stand in it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a key of the recipe, e.g. training.learning_rate=1e-4; may be repeated",
    )
    return parser


class _Parser(argparse.ArgumentParser):
    """Its commands' are of this class too."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from qlora import __version__

        print(f"qlora {__version__}")
        parser.exit()


def _train(options: argparse.Namespace) -> int:
    from qlora.recipe import load_recipe

    config = load_recipe(options.recipe, options.overrides)  # a typo is answered before torch is imported
    run = _run()

    outcome = run.train(config, resume=options.resume, overwrite=options.overwrite)
    return 130 if outcome.stopped else 0


def _data(options: argparse.Namespace) -> int:
    from qlora.recipe import load_recipe

    config = load_recipe(options.recipe, options.overrides)
    run = _run()

    run.show_data(config, options.samples)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from qlora.recipe import load_recipe, parse_recipe

    instead = []  # of what the recipe says; --set comes after it
    if options.model is not None:
        name = json.dumps(options.model, ensure_ascii=False)
        # Which commit, and whether its code may run, was said of another model.
        instead += [f"model.model_name_or_path={name}", "model.revision=", "model.trust_remote_code=false"]
    if options.max_seq_length is not None:
        instead.append(f"data.max_seq_length={options.max_seq_length}")
    overrides = instead + options.overrides
    if options.recipe is not None:
        config = load_recipe(options.recipe, overrides)
    elif options.model is not None:
        config = parse_recipe(_NO_DATA, overrides=overrides)
    else:
        options.misused("a RECIPE is needed, or --model")
    _hush()
    from qlora.plan.show import show_plan

    show_plan(config, options.card, options.vram, options.host_ram, as_json=options.as_json)
    return 0


_NO_DATA = "data: {datasets: [{path: unused}]}"  # a recipe needs some; a plan does not read them


def _runs(options: argparse.Namespace) -> int:
    from qlora.report.runs import show_runs

    show_runs(options.directories, as_json=options.as_json)
    return 0


def _export(options: argparse.Namespace) -> int:
    adapter = _resolved(options.adapter)
    is_path = Path(options.adapter).expanduser().is_dir()
    name = adapter.resolve().name if is_path else options.adapter.partition("@")[0].partition(":")[0]
    _hush()

    from qlora.exports import export

    export(
        adapter,
        options.to,
        Path(options.out or Path("exports") / name),
        name=name,
        weights=options.weights,
        gguf_type=options.gguf_type,
        base=options.base,
        force=options.force,
        verify=options.verify,
        push_to=options.push,
        trust_remote_code=options.trust_remote_code,
    )
    return 0


def _adapters(options: argparse.Namespace) -> int:
    from qlora.library.registry import Registry
    from qlora.library.show import answer
    from qlora.report.terminal import printable

    _hush_kernels()
    registry = Registry(say=lambda text: print(redact(f"note: {text}"), file=sys.stderr))
    words = [value for key, value in vars(options).items() if key.startswith("word_") and value is not None]
    named = {key: getattr(options, key, None) for key in ("name", "tag")}
    found = answer(options.action, registry, *words, **named)
    if options.as_json:
        print(json.dumps(found.value, indent=2, allow_nan=False))
    else:
        print(*(printable(line, sys.stdout.encoding) for line in found.lines), sep="\n")
    return found.status


def _combine(options: argparse.Namespace) -> int:
    _hush()
    from qlora import combining
    from qlora.report.terminal import printable

    keys = ("out", "method", "density", "rank", "seed", "evaluate", "trust_remote_code")
    how = {key: getattr(options, key) for key in keys if hasattr(options, key)}
    make = combining.combine if options.action == "combine" else combining.interference
    report = make(options.words, say=lambda text: print(redact(text), file=sys.stderr), **how)
    print(*(printable(redact(line), sys.stdout.encoding) for line in report.lines()), sep="\n")
    return 0


def _chat(options: argparse.Namespace) -> int:
    _hush()
    from qlora.serve.chat import chat

    how = {key: getattr(options, key) for key in ("system", "max_new_tokens", "temperature", "seed")}
    chat(_voices(options), base=options.base, trust_remote_code=options.trust_remote_code, **how)
    return 0


def _serve(options: argparse.Namespace) -> int:
    _hush()
    from qlora.serve.server import serve

    serve(
        _voices(options),
        host=options.host,
        port=options.port,
        api_key=options.api_key or os.environ.get("QLORA_API_KEY") or None,
        base=options.base,
        trust_remote_code=options.trust_remote_code,
    )
    return 0


def _voices(options: argparse.Namespace) -> Any:
    from qlora.live import named

    return {name: _resolved(str(place)) for name, place in named(options.adapters).items()}


def _resolved(reference: str) -> Any:
    """The directory that a name in the library, or a path, means."""
    from qlora.library.registry import Registry

    return Registry().resolve(reference)


def _doctor(options: argparse.Namespace) -> int:
    _hush()
    from qlora.plan.show import show_doctor

    show_doctor(measuring=options.measure)
    return 0


def _bench(options: argparse.Namespace) -> int:
    _hush()
    from qlora.bench.show import bench

    keys = ("model", "shape", "methods", "work", "r", "vram", "recipe", "optim", "search", "steps", "predict")
    return bench(options.suite, {key: getattr(options, key) for key in keys}, options.out)


def _bench_report(options: argparse.Namespace) -> int:
    from qlora.bench.show import report

    report(options.files, options.out)
    return 0


def _bench_compare(options: argparse.Namespace) -> int:
    from qlora.bench.show import compared

    return compared(options.old, options.new, options.threshold)


def _bench_schema(_: argparse.Namespace) -> int:
    from qlora.bench.results import Results

    print(json.dumps(Results.model_json_schema(), indent=2))
    return 0


def _generate(options: argparse.Namespace) -> int:
    run = _run()

    prompt = sys.stdin.read().strip() if options.prompt == "-" else options.prompt
    how = {"max_new_tokens": options.max_new_tokens, "trust_remote_code": options.trust_remote_code}
    print(run.generate(_resolved(options.adapter), prompt, **how))
    return 0


def _run() -> Any:
    """The module that does the work."""
    _hush()
    from qlora import run

    return run


def _hush() -> None:
    """Tell the libraries underneath to keep to what concerns the user."""
    _hush_kernels()
    if not sys.stderr.isatty():  # in a log a moving bar is thousands of lines
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _hush_kernels() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional CPU kernel at each start


def _schema(_: argparse.Namespace) -> int:
    from qlora.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))
    return 0
