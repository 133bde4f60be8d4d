"""Launches kernels for a GPU that is not there, and prints as JSON what each launch hands to the device.

A process of its own, since kernels are not interpreted here. Every line is one set of arguments: what Triton launches
for them; and what packc does, when it meets them first and when it meets them again, behind all others.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import torch
import triton
import triton.language as tl
from stand_in import StandIn
from triton.compiler import CompiledKernel

from packc.ops.selective_scan import triton_segments
from packc.ops.tritonsrc import documents
from packc.ops.tritonsrc.launch import autotuned, launch

handed: list = []


class Driver(StandIn):
    def get_benchmarker(self):
        """A tuner finds one configuration faster for some sizes, and another for others."""

        def seconds(call, quantiles):
            call()
            _, (blocks, _, _), (_, n) = handed.pop()
            return [blocks if n % 2 else -blocks] * 3

        return seconds


@autotuned([triton.Config({"BLOCK": block}) for block in (32, 64)], key=["n"])
@triton.jit(do_not_specialize=["n"])
def tuned(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, n, at < n)


@triton.jit
def strided(x, strides):
    x_t, x_h = strides
    tl.store(x + tl.program_id(0) * x_t + tl.program_id(1) * x_h, 1.0)


def stand_in():
    triton.runtime.driver.set_active(Driver())
    CompiledKernel._init_handles = lambda self: None
    CompiledKernel.function = None

    def hand(self):
        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
            constants = set(self.src.constants)
            rest = [_shown(a) for i, a in enumerate(arguments) if (i,) not in constants]
            handed.append([self.hash, [x, y, z], rest])

        return run

    CompiledKernel.run = property(hand)


def _shown(x):
    return f"{x.dtype} {x.data_ptr()}" if isinstance(x, torch.Tensor) else x


def only(run, *args, **kwargs):
    handed.clear()
    run(*args, **kwargs)
    assert len(handed) == 1, handed
    return handed[0]


def documents_of(dtype, tokens, count, aligned=True, steps=4):
    memory = torch.zeros(count + 2, dtype=dtype)
    arguments = {"cu_seqlens": memory[0 if aligned else 1 :], "out": torch.zeros(8, dtype=torch.int32)}
    arguments |= {"tokens": tokens, "documents": count, "STEPS": steps, "BLOCK": 256}
    return documents._document_of_token, (7,), arguments


def segments_of(channels, states, warps=1, packed=False, out_row=64):
    memory = torch.zeros(64)
    arguments = {"local": memory, "total": memory, "A": memory, "document": memory.int() if packed else None}
    arguments |= {"out": memory, "L": 70, "channels": channels, "states": states, "segment": 64, "segments": 2}
    arguments |= {"out_row": out_row, "out_segment": 32, "REVERSE": False, "PACKED": packed, "AT_ONCE": 2}
    return triton_segments._pass_states, (2, 3), arguments | {"BLOCK_D": 32, "num_warps": warps}


def tuned_of(n):
    return tuned, lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),), {"x": torch.zeros(1), "n": n}


def strided_by(*strides):
    return strided, (2, 3), {"x": torch.zeros(1), "strides": strides}


LAUNCHES = [
    documents_of(torch.int32, 100, 3),
    documents_of(torch.int64, 100, 3),
    documents_of(torch.int32, 2**33, 3),
    documents_of(torch.int32, 100, 3, aligned=False),
    documents_of(torch.int32, 100, 3, steps=8),
    segments_of(48, 16),
    segments_of(47, 16),
    segments_of(48, 1),
    segments_of(1, 1),
    segments_of(48, 16, warps=2),
    segments_of(48, 16, packed=True),
    segments_of(48, 16, out_row=2**32),
    tuned_of(200),
    tuned_of(201),
    strided_by(16, 1),
    strided_by(16, 3),
    strided_by(17, 1),
    strided_by(2**32, 1),
]


def main():
    stand_in()
    by_triton = [only(k[g], **a, enable_fp_fusion=True) for k, g, a in LAUNCHES]
    first = [only(launch, k, g, **a) for k, g, a in LAUNCHES]
    triton.JITFunction.run = triton.runtime.Autotuner.run = None  # not by way of Triton again
    again = [only(launch, k, g, **a) for k, g, a in LAUNCHES]
    for launches in zip(by_triton, first, again, strict=True):
        print(json.dumps(launches))


if __name__ == "__main__":
    main()
