"""Bytes of tensors that are alive at most during a call: all that torch's allocators hand out, its ops' own too."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any]) -> int:
    """Beyond what was alive before, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        with open(file.name) as text:
            events = json.load(text)["traceEvents"]
    changes = [(each["ts"], each["args"]["Bytes"]) for each in events if each.get("name") == "[memory]"]
    alive = most = 0
    for _, bytes_ in sorted(changes, key=lambda change: change[0]):
        alive += bytes_
        most = max(most, alive)
    return most
