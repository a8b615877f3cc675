"""The most memory that torch holds at once during a call: from the allocator on a GPU, from the profiler on a CPU.

A CPU's allocator keeps no peak. A process's resident set is no measure either: it is rounded to pages, and holds freed memory.
torch.profiler records every allocation and release of torch's CPU allocator, also inside an operation (the scratch space of a
fused kernel, the scores of an unfused one). The peak of their running sum is right to the byte. NumPy's arrays are not in it, and
should not be: in Triton's interpreter they are the registers and shared memory of a simulated GPU, and no GPU keeps those in its
memory.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes held at once while `call` runs, above those held before. The tensors that `call` returns count.

    On a GPU, run `call` once before: what the first run compiles, tunes or sets up for good is not the call's own.
    """
    if device.type != "cuda":
        return _peak_of_trace(_trace(call))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _trace(call: Callable[[], object]) -> list[dict]:
    """The profiler's events while `call` runs, in the order of time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else some builds of the profiler announce their start on the screen
    gc.collect()  # torch warns if the trace has a release without its allocation
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # The exported trace has every single allocation. `events()` adds up those inside an operation, which loses their peak.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return sorted((event for event in events if "ts" in event), key=lambda event: event["ts"])


def _peak_of_trace(events: list[dict]) -> int:
    """Peak of the running sum of allocations. A release of memory allocated before the trace does not count."""
    held: dict[int, int] = {}
    now = peak = 0
    for event in events:
        if event.get("name") != "[memory]" or event["args"]["Device Type"] != 0:  # 0 is the CPU
            continue
        address, n_bytes = event["args"]["Addr"], event["args"]["Bytes"]
        if n_bytes > 0:
            held[address] = n_bytes
            now += n_bytes
            peak = max(peak, now)
        else:
            now -= held.pop(address, 0)
    return peak
