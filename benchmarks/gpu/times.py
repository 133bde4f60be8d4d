"""Times of the ops at models' widths on 32k tokens, one row and packed, beside the peers that travelled.

A fraction of the card's ceilings (``card.py``) beside each: of what a copy moves, for reading every input and writing
every output once, and of a large product of matrices, for the operations of the chunked algorithm. Peers' results are
not checked.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import torch
from card import CEILINGS, seconds
from launching import as_asked
from mixer_contenders import document_of_token
from telling import each, is_lost, parser, said
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

FORMS = {"dense": "rows", "packed": "packed"}
Call = Callable[..., Tensor]  # of the tensors by their names, and ``cu_seqlens``


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--peers", action="store_true", help="these, not packc's ops")
    args = made.parse_args()
    as_asked()
    if travelled := os.environ.get("PACKC_GPU_PEERS"):
        sys.path.append(travelled)
    peers = {f"{op} by {library}": (op, find) for (op, library), find in PEERS.items()}
    tokens = 512 if args.dry else cases.TOKENS

    def facts_of(name: str) -> dict[str, Any]:
        torch.manual_seed(0)
        if name not in peers:
            return timed(name, name, None, tokens, args.dry)
        op, find = peers[name]
        try:
            call = find()
            _prepare_peers()
            return timed(name, op, call, tokens, args.dry)
        except Exception as error:
            if is_lost(error):
                raise
            return {"why": said(error)}  # no fault of packc

    if args.peers and args.dry:
        print("peers are for GPUs")
        return
    each(args, peers if args.peers else cases.OPS, facts_of)


def timed(name: str, op: str, call: Call | None, tokens: int, dry: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    told = []
    for form, rows in FORMS.items():
        inputs = cases.make(
            cases.Case(op, "bf16", rows), cases.long_pack(tokens)[0] if rows == "packed" else [tokens], dry
        )
        run = call or _ours(inputs)
        forward, both = _forward(run, inputs), _both(run, inputs)
        found: dict[str, Any] = {"forward_ms": 1e3 * seconds(forward, rounds=10)}
        try:
            found["both_ms"] = 1e3 * seconds(both, rounds=10)
        except Exception as error:
            if call is None:
                raise
            found["backward"] = said(error)
        if call is None:
            found |= _fractions(inputs, forward, both, found)
        facts[form] = found
        shown = "/".join(f"{found[key]:.3g}" if key in found else "-" for key in ("forward_ms", "both_ms"))
        ceilings = [key for key in ("copy_of_both", "mm_of_both") if key in found]
        of = "".join(f", {found[key]:.0%} {key.split('_')[0]}" for key in ceilings)
        told.append(f"{form} {shown} ms{of}")
    return facts | {"line": f"{name}: {'; '.join(told)}"}


def _ours(inputs: cases.Inputs) -> Call:
    return lambda cu_seqlens, **tensors: inputs.mixer.function(**tensors, **inputs.mixer.options, cu_seqlens=cu_seqlens)


def _forward(call: Call, inputs: cases.Inputs) -> Callable[[], Any]:
    def run() -> Tensor:
        with torch.no_grad():
            return call(inputs.cu_seqlens, **inputs.tensors)

    return run


def _both(call: Call, inputs: cases.Inputs) -> Callable[[], Any]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    return lambda: torch.autograd.grad(call(inputs.cu_seqlens, **leaves), list(leaves.values()), inputs.dout)


def _fractions(
    inputs: cases.Inputs, forward: Callable[[], Any], both: Callable[[], Any], found: dict[str, Any]
) -> dict[str, float]:
    file = Path(os.environ.get("PACKC_GPU_SCRATCH", "")) / CEILINGS
    if not file.is_file():
        return {}
    ceilings = json.loads(file.read_text())
    read, out = sum(x.nbytes for x in inputs.tensors.values()), inputs.dout.nbytes
    shares = {}
    # Backward: inputs and the gradient of out are read, and a gradient an input is written.
    for name, call, moved in (("forward", forward, read + out), ("both", both, read + out + out + 2 * read)):
        with FlopCounterMode(display=False) as counter:
            call()
        time = found[f"{name}_ms"] / 1e3
        shares[f"copy_of_{name}"] = moved / time / ceilings["bytes_per_second"]
        shares[f"mm_of_{name}"] = counter.get_total_flops() / time / ceilings["flops_per_second"]
    return shares


# ---- peers -----------------------------------------------------------------------------------------------------------


def _fla_convolution() -> Call:
    convolve = importlib.import_module("fla.modules.convolution").causal_conv1d
    return lambda cu, x, weight, bias: convolve(x, weight, bias, activation=None, cu_seqlens=_long(cu))[0]


def _fla_simple_gla() -> Call:
    attend = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    return lambda cu, q, k, v, g: attend(q, k, v, g, cu_seqlens=_long(cu))[0]


def _fla_gated_delta_rule() -> Call:
    attend = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    return lambda cu, q, k, v, g, beta: attend(q, k, v, g, beta, cu_seqlens=_long(cu))[0]


def _fla_kda() -> Call:
    attend = importlib.import_module("fla.ops.kda").chunk_kda
    return lambda cu, q, k, v, g, beta: attend(q, k, v, g, beta, cu_seqlens=_long(cu))[0]


def _mamba_ssd() -> Call:
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def call(cu: Tensor | None, x, dt, A, B, C, D, z, dt_bias) -> Tensor:
        index = None if cu is None else document_of_token(cu)
        return scan(
            x, dt, A, B, C, 256, D=D, z=z, dt_bias=dt_bias, dt_softplus=True, dt_limit=(0.01, 2.0), seq_idx=index
        )

    return call


def _mamba_scan() -> Call:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def call(cu: Tensor | None, u, delta, A, B, C, D, z, delta_bias) -> Tensor:
        if cu is not None:
            raise NotImplementedError("no documents")
        u, delta, B, C, z = (x.mT for x in (u, delta, B, C, z))
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True).mT

    return call


def _long(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.long()


PEERS: dict[tuple[str, str], Callable[[], Call]] = {
    ("ssd", "mamba_ssm"): _mamba_ssd,
    ("linear_attention", "fla"): _fla_simple_gla,
    ("gated_delta_rule", "fla"): _fla_gated_delta_rule,
    ("gated_delta_rule_per_channel", "fla"): _fla_kda,
    ("causal_conv1d", "fla"): _fla_convolution,
    ("selective_scan", "mamba_ssm"): _mamba_scan,
}


def _prepare_peers() -> None:
    """Peers try two configurations a kernel, as there is no time to compile all that they offer, and refuse nothing."""
    import triton

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("fla", "mamba_ssm"):
            for kernel in vars(module).values():
                while not isinstance(kernel, triton.runtime.Autotuner) and hasattr(kernel, "fn"):
                    kernel = kernel.fn
                if isinstance(kernel, triton.runtime.Autotuner):
                    kernel.configs = kernel.configs[:2]
    # fla refuses gradients that old Tritons miscompile on Hopper. Here nobody uses them.
    if refusing := sys.modules.get("fla.ops.common.chunk_o"):
        refusing.TRITON_ABOVE_3_7_1 = True


if __name__ == "__main__":
    main()
