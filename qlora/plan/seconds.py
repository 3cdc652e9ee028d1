"""How long a step takes on a machine, and what it waits for.

An operation takes as long as its FLOPs, its bytes, or its launch, whichever is most; operations of the device come one
after the other, and so does work of the host, for which the device waits. What moves is either hidden beside that or
not, as the schedule has it:

    forward, turn, backward  the next layer arrives while this one computes, activations leave and come back on a side
                             stream, the head's next chunk of the vocabulary comes while this one is multiplied. So a
                             phase takes as long as its computation, the bus in either direction (it is full duplex),
                             or the disk (reads and writes share it), whichever is most.
    prologue, optimizer      nothing runs beside: all of it adds up

Not modelled, each a few percent where it is anything:
    - trained weights that live on the host: a layer's come and its gradients go while the device waits, and not from
      page-locked memory; here their bytes are hidden like the others
    - a layer that arrives in the slot waits until the one before was expanded out of it, so on a step that the bus
      limits, the expansion of the streamed layers is not hidden
    - the first layer of a step, for which nothing computes meanwhile
    - layers that are spread unevenly: a phase is hidden as a whole or not at all
    - what reads and writes of host memory by copies take from the host's own work
"""

from __future__ import annotations

from qlora.plan.types import Phase, Rates, Time, Usage, Work

_BESIDE = frozenset({"forward", "turn", "backward"})  # phases that move bytes beside the computation


def time_of(usage: Usage, rates: Rates, ratio: float | None = None) -> Time:
    """Seconds of a step, by phase, and what holds each phase up.

    ratio  measured / predicted seconds of earlier runs; every phase is stretched by it. None: there were none
    """
    by_phase: dict[str, float] = {}
    limit: dict[str, str] = {}
    for name, phase in usage.phases.items():
        by_phase[name], limit[name] = _phase(phase, rates, name in _BESIDE)
        by_phase[name] *= 1.0 if ratio is None else ratio
    return Time(by_phase, limit)


def _phase(phase: Phase, rates: Rates, beside: bool) -> tuple[float, str]:
    """Seconds of a phase, and the largest of what they are made of."""
    compute, arithmetic = busy(phase.work, rates)
    host = sum(nbytes * n for (_, nbytes), n in phase.host_work.items()) / rates.host_memory
    moved = phase.moved
    ways = {
        "bus": [moved["host to device"] / rates.bus, moved["device to host"] / rates.bus],
        "disk": [(moved["from file"] + moved["to file"]) / rates.disk],
    }
    own = "compute" if arithmetic * 2 > compute else "memory"
    if beside:
        terms = {what: max(seconds) for what, seconds in ways.items()}
        spent = compute + host
        slowest = max(terms, key=lambda what: terms[what])
        if terms[slowest] > spent:
            return terms[slowest], slowest
        return spent, "host" if host > compute else own
    terms = {own: compute, "host": host} | {what: sum(seconds) for what, seconds in ways.items()}
    return sum(terms.values()), max(terms, key=lambda what: terms[what])


def busy(work: Work, rates: Rates) -> tuple[float, float]:
    """Seconds of the device's operations, and how many of them pass in those that their FLOPs hold up."""
    total = arithmetic = 0.0
    for (flops, nbytes), n in work.items():
        by_flops = flops / rates.flops
        others = max(nbytes / rates.memory, rates.launch)
        total += n * max(by_flops, others)
        arithmetic += n * by_flops if by_flops >= others else 0.0
    return total, arithmetic
