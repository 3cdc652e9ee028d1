"""Whether llama.cpp says what the live model says: it is run, greedily, on the same prompts.

    compare(answers, run(gguf, answers, lora=...), logits)   -> Agreement

It runs in a process of its own, as a file that it dislikes ends it, and answers over its own HTTP server on this
machine's loopback. From the messages it renders the template that is in the file and tokenizes the result; from the
prompt's token ids it goes on by itself until a token ends the answer. Two implementations round differently, so that
tokens whose logits nearly tie come out either way: the gap says whether a difference is such a one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import MachineError, ModelError

if TYPE_CHECKING:
    import torch

_SECONDS = 1800  # for all prompts; a 7B model on two cores takes minutes
_MORE = 32  # tokens in which an answer that went another way may come to its end


@dataclass(frozen=True, slots=True)
class Answer:
    """What the live model says, greedily.

    messages  turns up to the one that is answered
    prompt    their token ids
    ids       the answer's, with the token that ended it where one did
    """

    messages: Sequence[Mapping[str, str]]
    prompt: Sequence[int]
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Run:
    """What llama.cpp says.

    rendered  token ids that it makes of the messages by itself
    ids       of its answer, without the token that ended it
    stopped   whether a token ended it, and not its length
    """

    rendered: Sequence[int]
    ids: Sequence[int]
    stopped: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an answer first differs.

    prompt    its number
    at        tokens of the answer before it
    expected  the live model's token there
    found     llama.cpp's; None where it had ended the answer
    gap       by how much the live model's logit of `expected` is above that of `found`
    """

    prompt: int
    at: int
    expected: int
    found: int | None
    gap: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far llama.cpp and the live model agree.

    prompts      how many there were
    equal        answers that are the same to the last token
    rendered     prompts of which llama.cpp makes the same token ids
    ended        answers that the live model ended
    stopped      of those, which llama.cpp ended too, wherever
    differences  one for each other answer
    """

    prompts: int
    equal: int
    rendered: int
    ended: int
    stopped: int
    differences: tuple[Difference, ...]

    def figures(self) -> dict[str, Any]:
        """For run.json and cards: JSON-able."""
        return asdict(self)


def run(
    gguf: Path,
    answers: Sequence[Answer],
    end_ids: Sequence[int],
    *,
    lora: Path | None = None,
    threads: int | None = None,
) -> list[Run]:
    """Have llama.cpp answer the same prompts, with as many tokens as the live model took; a few more to end by itself.

    end_ids  tokens that end an answer
    lora     an adapter's .gguf to put on it
    threads  of the CPU; None is llama.cpp's choice

    Raises MachineError where llama.cpp is not installed, ModelError where it cannot load or run the file.
    """
    check_installed()
    most = max(len(answer.prompt) + len(answer.ids) for answer in answers)
    job = {
        "gguf": str(gguf),
        "lora": str(lora) if lora else None,
        "threads": threads,
        "context": -(-(most + _MORE) // 256) * 256,
        "answers": [
            {
                "messages": answer.messages,
                "prompt": answer.prompt,
                "most": len(answer.ids) + (_MORE if _ends(answer, end_ids) else 0),
            }
            for answer in answers
        ],
    }
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        try:
            ended = subprocess.run(
                [sys.executable, "-m", __name__, str(result)],
                input=json.dumps(job).encode(),
                capture_output=True,
                timeout=_SECONDS,
                env=environment,
            )
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"{gguf}: llama.cpp did not answer {len(answers)} prompts in {_SECONDS} s") from error
        if ended.returncode or not result.is_file():
            said = [line for line in ended.stderr.decode(errors="replace").splitlines() if line.strip()]
            raise ModelError(f"{lora or gguf}: llama.cpp cannot run it: " + " | ".join(said[-3:])[-600:])
        found = json.loads(result.read_text())
    runs = []
    for one in found:
        ids = one["ids"]
        stopped = one["stopped"]
        if ids and ids[-1] in end_ids:
            ids, stopped = ids[:-1], True
        runs.append(Run(one["rendered"], ids, stopped))
    return runs


def check_installed() -> None:
    """Raise MachineError where llama.cpp is not installed."""
    if find_spec("xllamacpp") is None:
        raise MachineError(
            "llama.cpp is not installed, so the export cannot be verified\n  pip install 'qlora-trainer[llama-cpp]'"
        )


def compare(
    answers: Sequence[Answer],
    runs: Sequence[Run],
    end_ids: Sequence[int],
    logits: Callable[[list[int]], torch.Tensor] | None = None,
) -> Agreement:
    """How far llama.cpp and the live model agree.

    logits  gives the live model's logits, [V], for what comes after token ids; None leaves the gaps out
    """
    equal = rendered = ended = stopped = 0
    differences: list[Difference] = []
    for number, (answer, found) in enumerate(zip(answers, runs, strict=True)):
        ends = _ends(answer, end_ids)
        expected = list(answer.ids[:-1] if ends else answer.ids)
        got = list(found.ids)
        rendered += list(found.rendered) == list(answer.prompt)
        ended += ends
        stopped += ends and found.stopped
        if got == expected and found.stopped == ends:
            equal += 1
            continue
        pairs = zip(expected, got, strict=False)
        at = next((k for k, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(expected), len(got)))
        ours = answer.ids[at] if at < len(answer.ids) else None
        theirs = got[at] if at < len(got) else None
        gap = None
        if logits is not None and ours is not None:
            after = logits([*answer.prompt, *expected[:at]])
            other = [theirs] if theirs is not None else list(end_ids)
            gap = float(after[ours] - after[other].max())
        differences.append(Difference(number, at, -1 if ours is None else ours, theirs, gap))
    return Agreement(len(answers), equal, rendered, ended, stopped, tuple(differences))


def _ends(answer: Answer, end_ids: Sequence[int]) -> bool:
    return bool(answer.ids) and answer.ids[-1] in end_ids


def _main(result: Path) -> None:
    """The process in which llama.cpp runs: a job comes by standard input, its result goes to a file."""
    import xllamacpp  # type: ignore[import-not-found]

    job = json.load(sys.stdin)
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx = job["gguf"], job["context"]
    parameters.n_parallel, parameters.warmup, parameters.verbosity = 1, False, 0
    parameters.n_gpu_layers = 0
    if job["threads"]:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job["threads"]
    if job["lora"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = job["lora"], 1.0
        parameters.lora_adapters = [adapter]
    server = xllamacpp.Server(parameters)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with opener.open(request, timeout=_SECONDS) as reply:
            return json.load(reply)

    found = []
    for answer in job["answers"]:
        text = ask("/apply-template", messages=answer["messages"])["prompt"]
        rendered = ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        said = ask(
            "/completion",
            prompt=answer["prompt"],
            n_predict=answer["most"],
            temperature=0.0,
            samplers=["temperature"],  # the most probable token, with nothing taken away before
            return_tokens=True,
            cache_prompt=False,
        )
        found.append({"rendered": rendered, "ids": said["tokens"], "stopped": said["stop_type"] == "eos"})
    result.write_text(json.dumps(found))
    os._exit(0)  # its threads have nothing left to bring to an end


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
