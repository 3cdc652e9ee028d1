"""Activations: whatever tier they wait in, the same bits come back, in the order of the step and in no other."""

import errno
import gc
import math
import random
import shutil
import sys
import threading
import time
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora.errors import MachineError
from qlora.train.activations import OnDevice, OnFile, OnHost, needed

CPU = torch.device("cpu")
RAGGED = [(1, 7, 6), (3, 2, 6), (1, 1, 6), (2, 5, 6), (1, 12, 6)]


def start(acts, hidden, layers):
    """Begin a step with what layer 0 receives."""
    acts.begin(hidden, layers)
    for j, x in enumerate(hidden):
        acts.put(0, j, x)


@pytest.fixture(params=["device", "host", "file"])
def acts(request, tmp_path):
    """An empty store of each tier."""
    return {"device": OnDevice, "host": lambda: OnHost(CPU), "file": lambda: OnFile(CPU, tmp_path)}[request.param]()


@pytest.fixture
def on_file(tmp_path):
    return OnFile(CPU, tmp_path)


def bits(shape, dtype=torch.bfloat16):
    """A tensor of any bits, NaN and infinity among them."""
    return torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def drive(acts, shapes, layers, dtype=torch.bfloat16, seen=lambda: None):
    """A whole step in its real order, each take compared with a plain dict. seen: called after each call."""
    expected = {(0, j): bits(shape, dtype) for j, shape in enumerate(shapes)}

    def put(i, j):
        expected[i, j] = bits(shapes[j], dtype)
        acts.put(i, j, expected[i, j].clone())
        seen()

    def take(i, j):
        x = acts.take(i, j)
        seen()
        assert same_bits(x, expected[i, j]), f"layer {i}, micro-batch {j}"

    start(acts, [expected[0, j].clone() for j in range(len(shapes))], layers)
    for i in range(layers - 1):
        for j in range(len(shapes)):
            take(i, j)
            put(i + 1, j)
    for i in range(layers - 1, -1, -1):
        for j in range(len(shapes)):
            take(i, j)
    acts.end()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layers", [1, 2, 7])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_same_bits_come_back(acts, k, layers, dtype):
    drive(acts, RAGGED[:k], layers, dtype)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.just(8)), min_size=1, max_size=6),
            st.integers(1, 6),
        ),
        min_size=1,
        max_size=3,
    ),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_any_steps_one_after_the_other_are_as_with_a_dict(tmp_path_factory, steps, dtype):
    for acts in (OnDevice(), OnHost(CPU), OnFile(CPU, tmp_path_factory.getbasetemp())):
        for shapes, layers in steps:
            drive(acts, shapes, layers, dtype)


@pytest.mark.parametrize("to_the_end", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 7])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_what_passes_from_layer_to_layer_comes_back_and_takes_the_place_of_what_was(k, layers, to_the_end, tmp_path):
    for acts in (OnDevice(passing=True), OnHost(CPU, passing=True), OnFile(CPU, tmp_path, passing=True)):
        for _ in range(2):
            now = [bits(shape) for shape in RAGGED[:k]]
            start(acts, [x.clone() for x in now], layers)
            for i in range(layers - 1):
                for j in range(k):
                    x = acts.take(i, j)
                    assert same_bits(x, now[j])
                    now[j] = bits(RAGGED[j])
                    # As a layer in tiles does: the gradient below is written over the one above.
                    x.view(torch.uint8).copy_(now[j].view(torch.uint8))
                    acts.put(i + 1, j, x)
            for j in range(k if to_the_end else 0):
                assert same_bits(acts.take(layers - 1, j), now[j])
            if isinstance(acts, OnHost):
                assert (0 if acts._arena is None else acts._arena.numel()) == (
                    sum(x.nbytes for x in now) if k > 1 else 0
                )
            if isinstance(acts, OnDevice):
                assert len(acts._kept) == (0 if to_the_end else k)
            acts.end()


def test_what_is_taken_can_be_trained_through(acts):
    start(acts, [torch.ones(1, 3, 4), torch.ones(1, 2, 4)], 2)
    with torch.no_grad():
        for j in range(2):
            acts.put(1, j, acts.take(0, j) * (j + 2))
    for i in (1, 0):
        for j in range(2):
            x = acts.take(i, j).requires_grad_()
            (x**2).sum().backward()
            assert torch.equal(x.grad, 2 * x)
    acts.end()


def test_a_store_does_not_make_the_callers_tensor_trainable(acts):
    hidden = torch.ones(1, 3, 4)
    start(acts, [hidden], 1)
    acts.take(0, 0).requires_grad_()
    assert not hidden.requires_grad


def test_a_transposed_activation_comes_back(acts):
    x = torch.randn(1, 4, 3)
    start(acts, [x.mT, x.mT.contiguous()], 1)
    assert torch.equal(acts.take(0, 0), x.mT)


OUT_OF_ORDER = {
    "take of a later micro-batch": lambda a: a.take(0, 1),
    "take of a later layer": lambda a: a.take(1, 0),
    "put before its take": lambda a: a.put(1, 0, bits((1, 2, 4))),
    "put twice": lambda a: (a.take(0, 0), a.put(1, 0, bits((1, 2, 4))), a.put(1, 0, bits((1, 2, 4)))),
    "take without the put between": lambda a: (a.take(0, 0), a.take(0, 1)),
    "put of another micro-batch": lambda a: (a.take(0, 0), a.put(1, 1, bits((1, 2, 4)))),
    "begin within a step": lambda a: start(a, [bits((1, 2, 4))], 1),
}


@pytest.mark.parametrize("wrong", OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
def test_another_order_is_a_bug_of_the_caller(acts, wrong):
    start(acts, [bits((1, 2, 4)), bits((1, 2, 4))], 3)
    with pytest.raises(AssertionError):
        wrong(acts)


def test_nothing_can_be_taken_after_the_last_or_outside_a_step(acts):
    with pytest.raises(AssertionError):
        acts.take(0, 0)
    start(acts, [bits((1, 2, 4))], 1)
    acts.take(0, 0)
    with pytest.raises(AssertionError):
        acts.take(0, 0)


@pytest.mark.parametrize("takes", range(5))
def test_a_step_that_breaks_off_leaves_nothing_and_the_next_one_is_whole(acts, takes):
    with pytest.raises(KeyboardInterrupt), acts:
        start(acts, [bits(shape) for shape in RAGGED], 3)
        for j in range(takes):
            acts.take(0, j)
            acts.put(1, j, bits(RAGGED[j]))
        raise KeyboardInterrupt
    drive(acts, RAGGED, 3)


def test_the_arena_is_exact_kept_and_grown_only_for_a_larger_step(monkeypatch):
    module = sys.modules[OnHost.__module__]  # `qlora.train`, the name, is the function
    sizes, host_buffer = [], module.host_buffer
    monkeypatch.setattr(module, "host_buffer", lambda n, device: sizes.append(n) or host_buffer(n, device))
    acts = OnHost(CPU)
    for layers in (3, 3, 2, 5):
        drive(acts, RAGGED, layers)
    nbytes = [2 * math.prod(shape) for shape in RAGGED]
    assert sizes == [needed(nbytes, 3), needed(nbytes, 5)]
    assert needed(nbytes, 3) == 3 * sum(nbytes) - nbytes[-1]


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_what_is_taken_next_is_always_on_its_way_and_nothing_comes_that_is_still_there(k, layers, monkeypatch):
    acts, fetches = OnHost(CPU), []
    fetch = acts._fetch
    monkeypatch.setattr(acts, "_fetch", lambda *args: fetches.append(args) or fetch(*args))
    start(acts, [bits(shape) for shape in RAGGED[:k]], layers)
    up = k * (layers - 1)
    total = layers - 1 if k == 1 else up + k * layers - 1  # the last one put never left
    for n in range(up + k * layers):
        i, j = divmod(n, k) if n < up else (layers - 1 - (n - up) // k, (n - up) % k)
        acts.take(i, j)
        ahead = max(n + 1 - up, 0) if k == 1 else n + 2
        # in the last layer's round, the next may be the one that never left
        assert len(fetches) in ({min(ahead, total), ahead - 1} if n >= up else {ahead})
        if n < up:
            acts.put(i + 1, j, bits(RAGGED[j]))
    assert len(fetches) == total
    acts.end()


class Births(torch.utils._python_dispatch.TorchDispatchMode):
    """Knows the storages of all tensors that came out of an operation."""

    def __init__(self):
        super().__init__()
        self.alive = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.alive.add(out.untyped_storage())
        return out


@pytest.mark.parametrize("layers", [2, 7])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
@pytest.mark.parametrize("tier", [OnHost, OnFile])
def test_three_activations_at_most_are_on_the_device(tier, k, layers, tmp_path):
    acts = OnHost(CPU) if tier is OnHost else OnFile(CPU, tmp_path)
    shape, most = (1, 64, 8), 0
    nbytes = 2 * math.prod(shape)
    with Births() as births:
        start(acts, [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(k)], layers)

        def count():
            nonlocal most
            # one [B, T, H] each; the host's arena and staging are larger
            most = max(most, sum(storage.nbytes() == nbytes for storage in births.alive))

        for i in range(layers - 1):
            for j in range(k):
                acts.put(i + 1, j, acts.take(i, j) + 1)
                count()
        for i in range(layers - 1, -1, -1):
            for j in range(k):
                assert (acts.take(i, j) == i).all()
                count()
        acts.end()
        assert most == 3
        most = 0
        count()
        assert most == 0


class LateDevice:
    """An accelerator's two streams in little: the host only issues work, and it is done later, in any order that the
    events allow. Memory that the host let go of is overwritten by what is computed next.

    eager  0..1  how much rather the lane goes on than the computation
    """

    def __init__(self, seed, eager):
        self.random, self.eager, self.lock = random.Random(seed), eager, threading.RLock()
        self.queues = {"compute": deque(), "lane": deque()}
        self.allocated = {}  # address -> memory

    def issue(self, queue, work=lambda: None, after=None):
        done = LateEvent(self)
        with self.lock:
            self.queues[queue].append((after, work, done))
        return done

    def advance(self):
        with self.lock:
            ready = [q for q, works in self.queues.items() if works and (works[0][0] is None or works[0][0].happened)]
            assert ready, "the streams wait for each other"
            queue = ("lane" if self.random.random() < self.eager else "compute") if len(ready) == 2 else ready[0]
            _, work, done = self.queues[queue].popleft()
            work()
            done.happened = True

    def some(self):
        for _ in range(self.random.randrange(6)):
            if any(self.queues.values()):
                self.advance()

    def finish(self):
        while any(self.queues.values()):
            self.advance()

    def memory_of(self, tensor):
        """The bytes of a tensor, with no hold on the tensor itself if it is one of ours."""
        whole = self.allocated.get(tensor.data_ptr(), tensor.detach().flatten().view(torch.uint8).numpy())
        return whole[: tensor.nbytes]

    def empty(self, nbytes):
        memory = torch.empty(nbytes, dtype=torch.uint8).numpy()
        tensor = torch.from_numpy(memory)
        self.allocated[tensor.data_ptr()] = memory
        weakref.finalize(tensor.untyped_storage(), self.issue, "compute", lambda: memory.fill(0xAB))
        return tensor


class LateEvent:
    def __init__(self, device):
        self.device, self.happened = device, False

    def synchronize(self):
        while not self.happened:
            self.device.advance()


class LateLane:
    """`Lane` on a LateDevice."""

    def __init__(self, device):
        self.device = device

    def copy(self, to, source, after=None):
        to, source = self.device.memory_of(to), self.device.memory_of(source)
        return self.device.issue("lane", lambda: to.__setitem__(slice(None), source), after)

    def now(self):
        return self.device.issue("compute")

    def follow(self, event):
        if event is not None:
            self.device.issue("compute", after=event)


@pytest.mark.parametrize("eager", [0, 0.5, 1])
@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("tier", ["host", "file"])
def test_copies_beside_the_computation_are_in_time(tier, k, layers, eager, tmp_path):
    sizes = [24, 8, 40, 16, 40][:k]
    for seed in range(10):
        device = LateDevice(seed, eager)
        acts = OnHost(CPU) if tier == "host" else OnFile(CPU, tmp_path)
        acts._lane = LateLane(device)
        wrong = []

        def compute(*, reads=None, writes=None, content=0, wrong=wrong, device=device):
            x = None if reads is None else device.memory_of(reads)
            y = None if writes is None else device.memory_of(writes)

            def work():
                if x is not None and not (x == content).all():
                    wrong.append(content)
                if y is not None:
                    y.fill(content + 16)

            device.issue("compute", work)
            device.some()

        for steps in range(2):
            hidden = [device.empty(size) for size in sizes]
            for j, x in enumerate(hidden):
                compute(writes=x, content=100 * steps + j - 16)
            start(acts, hidden, layers)
            acts._ring = [device.empty(max(sizes)) for _ in range(2)]
            del hidden, x
            for i in range(layers - 1):
                for j, size in enumerate(sizes):
                    x, y = acts.take(i, j), device.empty(size)
                    compute(reads=x, writes=y, content=100 * steps + 16 * i + j)
                    acts.put(i + 1, j, y)
                    del x, y
            for i in range(layers - 1, -1, -1):
                for j in range(k):
                    compute(reads=acts.take(i, j), content=100 * steps + 16 * i + j)
            acts.end()
        device.finish()
        assert not wrong


@pytest.mark.parametrize("tier", [OnDevice, lambda: OnHost(CPU)], ids=["device", "host"])
def test_a_step_runs_on_fake_tensors(tier):
    with FakeTensorMode():
        acts = tier()
        start(acts, [torch.empty(shape, dtype=torch.bfloat16) for shape in RAGGED], 2)
        for j in range(len(RAGGED)):
            acts.put(1, j, acts.take(0, j) + 1)
        for i in (1, 0):
            for j, shape in enumerate(RAGGED):
                x = acts.take(i, j).requires_grad_()
                x.sum().backward()
                assert x.grad.shape == shape
        acts.end()


@pytest.mark.parametrize("moment", ["within", "after"])
def test_the_file_leaves_nothing_in_its_directory(on_file, tmp_path, moment):
    drive(on_file, RAGGED, 3)
    assert on_file._file.seek(0, 2) == needed([2 * math.prod(shape) for shape in RAGGED], 3)
    if moment == "after":
        on_file = None
        gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_anything_is_written(on_file, tmp_path, monkeypatch):
    hidden = [torch.empty(1, 2**20, 8, dtype=torch.bfloat16)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(MachineError) as error:
        start(on_file, hidden, 129)
    assert str(error.value).startswith(
        f"the activations of a step need 2.00 GiB of disk; {tmp_path} has 0.00 GiB free\n"
    )
    assert "memory.activations_dir" in str(error.value) and "memory.activations: host" in str(error.value)
    assert on_file._file.seek(0, 2) == 0
    drive(on_file, RAGGED, 3)


def test_the_files_own_bytes_count_as_free(on_file, monkeypatch):
    drive(on_file, RAGGED, 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    drive(on_file, RAGGED, 3)
    with pytest.raises(MachineError):
        drive(on_file, RAGGED, 4)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MachineError, match=r"nowhere: No such file or directory"):
        start(OnFile(CPU, tmp_path / "nowhere"), [bits((1, 2, 4))], 2)


class Broken:
    """A file whose n-th write, or every read, fails."""

    def __init__(self, file, writes=math.inf, reads=math.inf):
        self.file, self.writes, self.reads = file, writes, reads

    def seek(self, *args):
        return self.file.seek(*args)

    def write(self, data):
        self.writes -= 1
        if self.writes < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[:5])  # and it writes in small pieces, as a file may

    def readinto(self, data):
        return 0 if self.reads == 0 else self.file.readinto(data[:7])


@pytest.mark.parametrize("good", [0, 1, 6, 11])
@pytest.mark.parametrize("k", [1, 4])
def test_a_failed_write_ends_the_step_and_names_the_place(on_file, tmp_path, k, good):
    drive(on_file, [(1, 1, 5)] * k, 4)
    sound, on_file._file = on_file._file, Broken(on_file._file, writes=2 * good)
    if k == 1 and good > 2:  # three activations of two pieces each are all that is written
        drive(on_file, [(1, 1, 5)] * k, 4)
        return
    with pytest.raises(MachineError, match="No space left on device") as error:
        drive(on_file, [(1, 1, 5)] * k, 4)
    assert str(tmp_path) in str(error.value)
    on_file.end()
    on_file._file = sound
    drive(on_file, [(1, 1, 5)] * k, 4)


def test_a_write_that_fails_after_the_step_broke_off_is_no_error_of_the_next(on_file, monkeypatch):
    def slow_and_broken(*args):
        time.sleep(0.05)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(on_file, "_write", slow_and_broken)
        start(on_file, [bits((1, 2, 4))] * 2, 3)
        on_file.end()
    drive(on_file, RAGGED, 3)


def test_a_file_that_was_cut_short_is_an_error(on_file):
    drive(on_file, RAGGED, 2)
    on_file._file = Broken(on_file._file, reads=0)
    with pytest.raises(MachineError, match="shorter than what was written"):
        drive(on_file, RAGGED, 2)


def test_pieces_that_the_system_chooses_are_put_together(on_file):
    drive(on_file, RAGGED, 2)
    on_file._file = Broken(on_file._file)
    drive(on_file, RAGGED, 4)


def test_the_time_spent_on_waiting_for_the_disk_is_counted(on_file, monkeypatch):
    read = on_file._read
    monkeypatch.setattr(on_file, "_read", lambda *args: (time.sleep(0.01), read(*args)))
    drive(on_file, [(1, 2, 4)], 4)
    assert 0.03 < on_file.time_waited < 3  # three of four are read
    drive(OnHost(CPU), [(1, 2, 4)], 4)
    drive(on_file, [(1, 2, 4)], 1)
    assert on_file.time_waited == 0
