"""Host buffers: exact, aligned, and refused before the system kills for them."""

import pytest
import torch

from qlora.errors import HostMemoryError
from qlora.model import transfer
from qlora.model.transfer import HOST, PAGE, Lane, host_buffer


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 3 * PAGE + 5])
def test_a_buffer_is_as_large_as_asked_for_and_begins_on_a_page(nbytes):
    buffer = host_buffer(nbytes, HOST)
    assert buffer.shape == (nbytes,) and buffer.dtype == torch.uint8
    assert nbytes == 0 or buffer.data_ptr() % PAGE == 0


def test_more_than_is_free_is_refused_with_both_figures_and_what_to_change(monkeypatch):
    monkeypatch.setattr(transfer, "free_bytes", lambda device: 3 * 2**30)
    with pytest.raises(
        HostMemoryError, match=r"4\.00 GiB .* 3\.00 are free\n.*memory\.layers_on_host.*activations: file"
    ):
        host_buffer(4 * 2**30, HOST)


def test_memory_that_cannot_be_locked_is_refused_with_the_limit(monkeypatch):
    class Runtime:
        def cudaHostRegister(self, address, nbytes, flags):
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    with pytest.raises(
        HostMemoryError, match=r"0\.01 GiB .*page-locked \(CUDA error 2; .*locked-memory limit.*\n.*ulimit"
    ):
        host_buffer(10 * 2**20, torch.device("cuda"))


def test_locked_memory_is_unlocked_when_the_last_view_of_it_is_gone(monkeypatch):
    calls = []

    class Runtime:
        def cudaHostRegister(self, address, nbytes, flags):
            calls.append(("lock", address, nbytes))
            return 0

        def cudaHostUnregister(self, address):
            calls.append(("unlock", address))

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    buffer = host_buffer(5 * PAGE, torch.device("cuda"))
    view, address = buffer[PAGE:], buffer.data_ptr()
    del buffer
    assert calls == [("lock", address, 5 * PAGE)]
    del view
    assert calls[1:] == [("unlock", address)]


def test_on_the_cpu_a_copy_is_done_when_it_is_issued():
    lane, to, source = Lane(HOST), torch.zeros(5), torch.arange(5.0)
    assert lane.copy(to, source, after=lane.now()) is None and lane.mark() is None
    lane.follow(None)
    assert torch.equal(to, source)
