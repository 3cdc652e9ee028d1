"""Many askers, one model: questions wait in a queue, and one thread answers them in batches, an adapter at a time.

The oldest question says which adapter is next, and those that wait for the same one are answered beside it, so that
nobody is overtaken for long and a change of adapter (milliseconds) is paid once a batch.

What else there was to choose: transformers' continuous batching lets questions join a batch that is under way, but it
generates with one state of the model's adapters for all of them, and the model's own attention is replaced by a paged
one. PEFT can mix adapters in one batch (`adapter_names`), for plain LoRA only and in its own slower forward. Through
`generate` every adapter that PEFT loads answers as it does in `qlora generate`. The price: a question that comes while
a batch runs waits for the batch's longest answer. For big loads there are engines with kernels for this (vLLM's
`--lora-modules`).
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from qlora.errors import QLoRAError
from qlora.live import Answer, Live, Question


class Refused(Exception):
    """A question that is not taken: the queue is full, or the engine is closing."""


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt was read, and is being answered."""


Event = Started | str | Answer | Exception


@dataclass(slots=True, eq=False)
class Job:
    """A question on its way.

    name      of the adapter; None: the base
    deadline  on time.monotonic's clock; what is not answered by then is cut
    """

    name: str | None
    messages: Sequence[dict[str, str]]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: Sequence[str]
    deadline: float
    _events: SimpleQueue[Event] = field(default_factory=SimpleQueue)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.deadline

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._cancelled.set()

    def over(self) -> bool:
        """Whether it is not worth going on."""
        return self._cancelled.is_set() or self.late

    def tell(self, event: Event) -> None:
        self._events.put(event)

    def events(self, look: Callable[[], None], every: float = 1.0) -> Iterator[Event]:
        """What becomes of it: Started, pieces of text, and last the Answer or an Exception.

        look  called every so many seconds while nothing comes; it may raise
        """
        while True:
            try:
                event = self._events.get(timeout=every)
            except Empty:
                look()
                continue
            yield event
            if isinstance(event, Answer | Exception):
                return


class Engine:
    """The queue and its thread.

    Once started the model is this thread's alone: chat templates too are run there, as their limits on memory are the
    whole process's.
    """

    def __init__(self, live: Live, batch: int, waiting: int, say: Callable[[str], None]) -> None:
        """batch: questions answered at once, at most. waiting: those that may wait beside them. say: told of bugs."""
        self.live, self.batch, self.waiting = live, batch, waiting
        self._say = say
        self._jobs: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="qlora-engine")
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Have it answered. Raises Refused."""
        with self._changed:
            if self._closing:
                raise Refused("closing")
            if len(self._jobs) >= self.waiting:
                raise Refused("full")
            self._jobs.append(job)
            self._changed.notify_all()

    def close(self, grace: float) -> None:
        """Take nothing more, answer what was taken, and after `grace` seconds cut what is left."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(grace)
        with self._changed:
            for job in [*self._jobs, *self._running]:
                job.cancel()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            try:
                self._answer(jobs)
            except QLoRAError as error:
                for job in jobs:
                    job.tell(error)
            except Exception as error:  # a bug, but the other questions' askers need not suffer from it
                self._say(traceback.format_exc())
                for job in jobs:
                    job.tell(error)
            finally:
                with self._changed:
                    self._running = []

    def _next(self) -> list[Job]:
        """The oldest question and others to the same adapter; empty when there is nothing more to come."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closing)
            name = self._jobs[0].name if self._jobs else None
            taken = [job for job in self._jobs if job.name == name][: self.batch]
            for job in taken:
                self._jobs.remove(job)
            self._running = taken
            return taken

    def _answer(self, jobs: Sequence[Job]) -> None:
        self.live.use(jobs[0].name)
        asked: list[tuple[Job, Question]] = []
        for job in jobs:
            if job.over():  # while it waited
                job.tell(Answer("", "cut", 0, 0))
                continue
            try:
                prompt = self.live.prompt(job.messages)
            except QLoRAError as error:
                job.tell(error)
                continue
            job.tell(Started())
            how = (job.max_new_tokens, job.temperature, job.top_p, job.seed, job.stop)
            asked.append((job, Question(prompt, *how, on_text=job.tell, requested=job.over)))
        if asked:
            answers = self.live.answers([question for _, question in asked])
            for (job, _), answer in zip(asked, answers, strict=True):
                job.tell(answer)
