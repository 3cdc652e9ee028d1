"""Fuzzing by coverage: what reaches new lines of our code is changed further. Our own errors are all there is."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.torture.targets import TARGETS

pytestmark = pytest.mark.torture


@pytest.mark.skipif(find_spec("atheris") is None, reason="takes atheris")
@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_that_reach_further_give_a_traceback_or_fill_the_memory(name, tmp_path, times):
    options = [f"-runs={times(500, 10_000)}", "-max_len=4096", "-timeout=10", "-seed=1"]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.torture.guided", name, tmp_path, *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert re.search(r"Done \d+ runs", ran.stderr)
