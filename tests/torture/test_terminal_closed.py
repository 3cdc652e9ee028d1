"""The window of a run is closed: it saves the step that it is in, though nobody reads any more what it prints."""

import os
import select
import sys
import time

import pytest

from qlora.report.events import read_events
from qlora.train.checkpoint import newest
from tests.tiny import chat_model, recipe_text

pty = pytest.importorskip("pty")


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint(tmp_path, checkpoint):
    text = recipe_text(chat_model(checkpoint), tmp_path, training={"max_steps": 5000, "gradient_accumulation_steps": 1})
    (tmp_path / "recipe.yaml").write_text(text)
    command = "import sys; from qlora.cli import main; sys.exit(main(sys.argv[1:]))"
    child, terminal = pty.fork()
    if child == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-c", command, "train", str(tmp_path / "recipe.yaml")])
    log, until = tmp_path / "out" / "events.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count('"step", ') < 3:
        assert time.monotonic() < until
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)  # a terminal that is not read makes its writer wait
    os.close(terminal)
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 130
    events = read_events(log)
    assert events[-1]["event"] == "end" and events[-1]["stopped"] == "interrupted"
    last = max(event["step"] for event in events if event["event"] == "step")
    assert newest(tmp_path / "out", print).path.name == f"checkpoint-{last}"
