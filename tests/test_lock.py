"""A directory's lock: one process at a time, and nobody once it is dead."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from qlora import lock
from qlora.lock import Lock, Locked, holder

HOLD = "import sys, time; from pathlib import Path; from qlora.lock import Lock; held = Lock(Path(sys.argv[1]));"
HOLD += "print('held', flush=True); time.sleep(60)"


def test_one_at_a_time_and_who_has_it_is_known(tmp_path):
    assert holder(tmp_path) is None
    with Lock(tmp_path):
        assert f"process {os.getpid()} on " in str(holder(tmp_path))
        with pytest.raises(Locked, match=f"process {os.getpid()} on "):
            Lock(tmp_path)
    assert holder(tmp_path) is None and not list(tmp_path.iterdir())
    Lock(tmp_path).release()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_nothing(number, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=os.getcwd()
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert f"process {process.pid} on " in str(holder(tmp_path))
        with pytest.raises(Locked):
            Lock(tmp_path)
        process.send_signal(number)
    assert holder(tmp_path) is None
    Lock(tmp_path).release()


def test_however_many_want_it_at_once_it_has_one_holder(tmp_path, monkeypatch):
    """Each takes the file away when it is done, under the hands of those who wait for it."""
    monkeypatch.setattr(lock, "_PATIENCE", 20)
    inside, most, times = [], [], []

    def work():
        for _ in range(5):
            with Lock(tmp_path):
                inside.append(1)
                most.append(len(inside))
                times.append(1)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 40 and max(most) == 1


def test_what_the_holder_wrote_may_be_anything(tmp_path):
    with Lock(tmp_path):
        (tmp_path / lock.FILE).write_bytes(b"[1, 2")
        assert holder(tmp_path) == "another process"
