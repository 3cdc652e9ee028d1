"""Results as a run would have left them, made up."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora.bench.results import Agreement, Loaded, Peaks, Predicted, Results, Row, Status, StepTaken, Trial

CATEGORIES = {"base": 0.2, "activations": 0.3, "adapters": 0.05}


def steps(seconds: Sequence[float], first_loss: float = 2.0, joules: float | None = None) -> list[StepTaken]:
    """As long as said; 80% compute, 10% waiting for weights, 10% optimizer; the loss falls by a tenth a step."""
    return [
        StepTaken(
            seconds=s,
            compute=0.8 * s,
            weights=0.1 * s,
            data=0.0,
            optimizer=0.1 * s,
            loss=first_loss * 0.9**n,
            joules=joules,
        )
        for n, s in enumerate(seconds)
    ]


def row(
    method: str = "qlora",
    seconds: Sequence[float] = (1.0, 1.1, 1.2),
    work: tuple[int, int, int] = (8, 1, 128),
    peaks: Peaks | None = None,
    **more: Any,
) -> Row:
    """A row that is ok, on a CPU, of 8 x 128 tokens."""
    k, rows, tokens = work
    taken = steps([2.0, *seconds], joules=more.pop("joules", None))
    return Row.model_validate(
        {
            "name": method,
            "method": method,
            "model": "models/SmolLM2-135M.gguf",
            "is_shape": False,
            "r": 16,
            "optim": "adamw_torch",
            "vram": None,
            "k": k,
            "rows": rows,
            "tokens": tokens,
            "status": "ok",
            "loaded": Loaded(seconds=3.0, parameters=135_000_000, trained=4_900_000, host_peak_gib=0.6),
            "warm_up": taken[:1],
            "steps": taken[1:],
            "peaks": peaks or Peaks(tensors=0.55, by_category=CATEGORIES if method == "qlora" else {}, host=0.9),
        }
        | more
    )


def without_figures(method: str, status: Status, error: str | None = None, **more: Any) -> Row:
    """A row of a method that did not get to a step."""
    return row(method, seconds=(), status=status, error=error, loaded=None, warm_up=[], **more).model_copy(
        update={"peaks": None}
    )


def results(rows: Sequence[Row], settings: Mapping[str, Any] | None = None, **more: Any) -> Results:
    """A file of a CPU suite whose first method is `qlora`."""
    return Results.model_validate(
        {
            "suite": "cpu",
            "title": "SmolLM2 on a CPU",
            "date": "2026-11-22T08:00:00+00:00",
            "device": "cpu",
            "device_name": "Some CPU",
            "settings": {"methods": ["qlora", "hf-qlora"], "search": None, **(settings or {})},
            "environment": {
                "commit": "0123456789abcdef",
                "dirty": False,
                "command": "qlora bench cpu",
                "versions": {"python": "3.11", "torch": "2.13.0"},
                "hardware": {"cpu": "Some CPU", "cores": 2},
            },
            "ceiling": None,
            "rows": list(rows),
            "complete": True,
        }
        | more
    )


def cpu() -> Results:
    """Two works, two methods with figures, one that did not fit, one that crashed and one that is not there."""
    rows = []
    for work, slower in (((8, 1, 128), 2.0), ((4, 1, 512), 1.0)):
        rows += [
            row("qlora", (1.0, 1.1, 1.2), work),
            row("hf-qlora", [slower * s for s in (1.05, 1.1, 1.15)], work, Peaks(tensors=1.1, host=1.2)),
            without_figures("full", "out of memory", work=work),
            without_figures("lora", "failed", "ValueError: no | such\nthing", work=work, traceback="Traceback\n..."),
            without_figures("unsloth", "not installed", work=work),
        ]
    same = [
        Agreement(
            model=rows[0].model,
            work=work,
            r=16,
            vram=None,
            base="4-bit",
            methods=["qlora", "hf-qlora"],
            first=first,
            later=0.002,
            agree=True,
        )
        for work, first in (("8 x 128", 1e-5), ("4 x 512", 3e-5))
    ]
    return results(rows, agreements=same, ceiling=1e11)


def gpu() -> Results:
    """An 8B shape at three lengths, with allocator's figures, power, operations and plans."""
    rows = []
    for n, tokens in enumerate((512, 2048, 8192)):
        for method, slower, gib in (("qlora", 1.0, 6.0), ("hf-qlora", 1.6 + 0.3 * n, 11.0)):
            work = 4, 1, tokens
            ours = method == "qlora"
            second = slower * tokens / 512
            allocated = gib + tokens / 1024
            peaks = Peaks(
                tensors=allocated,
                by_category={"base": 5.0, "activations": allocated - 5.2, "adapters": 0.2} if ours else {},
                allocated=allocated,
                reserved=allocated + 1,
                host=4.0,
            )
            planned = Predicted(allocated=allocated * 0.98, reserved=allocated + 0.8, seconds=second * 1.05)
            rows.append(
                row(
                    method,
                    [second, 1.02 * second, 1.05 * second],
                    work,
                    peaks,
                    model="llama-8b",
                    is_shape=True,
                    joules=300.0 * second,
                    flops=4e14 * second / slower,
                    model_flops=3e14 * second / slower,
                    predicted=planned if ours else None,
                )
            )
    return results(
        rows,
        suite="throughput",
        title="8B on a GPU",
        device="cuda",
        device_name="Some GPU",
        ceiling=6e14,
    )


def context() -> Results:
    """A search for the longest context under three caps; the stock stack does not fit the smallest."""
    rows = []
    for cap, ours, theirs in ((8.0, 6144, None), (16.0, 40960, 4096), (24.0, 90112, 10240)):
        for method, tokens in (("qlora", ours), ("hf-qlora", theirs)):
            if tokens is None:
                rows.append(without_figures(method, "out of memory", work=(1, 1, 2048), vram=cap, model="llama-8b"))
                continue
            trials = [Trial(tokens=tokens, status="ok", seconds=1.0), Trial(tokens=2 * tokens, status="out of memory")]
            peaks = Peaks(tensors=0.9 * cap, allocated=0.9 * cap, reserved=0.97 * cap, host=3.0)
            rows.append(row(method, (tokens / 1000,), (1, 1, tokens), peaks, vram=cap, model="llama-8b", trials=trials))
    settings = {"search": "context", "vram": [8.0, 16.0, 24.0]}
    return results(rows, settings, suite="context", title="Longest context", device="cuda", device_name="Some GPU")


def hostile() -> Results:
    """Every word that a file has a say in is an attempt on the page."""
    bad = "<script>alert(1)</script>"
    rows = [
        row("qlora", name=bad, model=bad, optim=bad),
        row("hf-qlora", name=f"$x_1$ {bad}", model=bad, optim=bad),
        without_figures("full", "failed", bad, name=f"|{bad}", model=bad, traceback=bad),
    ]
    return results(
        rows,
        {"methods": [{"method": "qlora", "name": bad}], bad: bad},
        suite=bad,
        title=bad,
        date=bad,
        device_name=bad,
        environment={"commit": bad, "command": f"`{bad}", bad: {bad: [bad]}},
        agreements=[
            Agreement(model=bad, work=bad, r=16, vram=None, base=bad, methods=[bad], first=1.0, later=1.0, agree=False)
        ],
    )
