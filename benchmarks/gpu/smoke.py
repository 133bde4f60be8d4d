"""Whether each op runs at all, forward and backward, and comes near fp64: few tokens, at models' widths."""

from __future__ import annotations

from typing import Any

import cases
import torch
from mixers import exactly
from selective_scan_data import relative_error
from telling import device, each, parser

from packc import config, ops

LENGTHS = [5, 0, 65]
WIDTH = 4096  # of what is packed
NEAR = 2e-2  # of the largest entry, in bf16


def main() -> None:
    args = parser(__doc__).parse_args()
    of_op = {case.op: case for case in cases.CASES if case.form == "packed"}

    def facts_of(name: str) -> dict[str, Any]:
        torch.manual_seed(0)
        if name in others:
            with device(args.dry):
                return others[name]()
        return near(cases.make(of_op[name], LENGTHS, args.dry))

    # Interpreted, kernels run under a dry run too.
    kernels = "triton" if args.dry and _interpreted() else "auto"
    others = {"pack": packed_bits} | ({"varlen_attention": attention} if kernels == "auto" else {})
    with config.patch(kernels=kernels):
        each(args, [*others, *of_op], facts_of)


def near(inputs: cases.Inputs) -> dict[str, Any]:
    results = inputs.results()
    exact = exactly(inputs.mixer, inputs.tensors, *inputs.arguments(), output_final_state=False)
    errors = {name: relative_error(x, exact[name]) for name, x in results.items()}
    far = [f"{name} off by {error:.1e}" for name, error in errors.items() if not error < NEAR]
    return {"ok": not far, "why": ", ".join(far), "error": max(errors.values())}


def _interpreted() -> bool:
    from packc.ops.triton_presence import interpreted

    return interpreted()


def packed_bits() -> dict[str, Any]:
    """There and back: the same bits, and zeros at padding."""
    mask = torch.arange(96) < torch.tensor([[96], [0], [5], [70]])
    x = torch.randn(*mask.shape, WIDTH, dtype=torch.bfloat16).requires_grad_()
    index, _ = ops.packing_index(mask)
    packed, back, grad = there_and_back(x, index)
    wanted = torch.where(mask[..., None], x, 0)
    ok = packed[0].equal(x[mask]) and back.equal(wanted) and grad.equal(mask[..., None].expand_as(grad).to(grad.dtype))
    return {"ok": ok, "why": "" if ok else "other bits"}


def there_and_back(x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = ops.pack(x, index)
    back = ops.unpack(packed, index, *x.shape[:2])
    (grad,) = torch.autograd.grad(back, x, torch.ones_like(back))
    return packed, back, grad


def attention() -> dict[str, Any]:
    cu_seqlens = torch.tensor([0, 5, 70], dtype=torch.int32)
    leaves = [torch.randn(1, 70, 4, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]

    def results(*leaves: torch.Tensor) -> list[torch.Tensor]:
        out = ops.varlen_attention(*leaves, cu_seqlens=cu_seqlens)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    exact = results(*(x.detach().double().requires_grad_() for x in leaves))
    errors = [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(results(*leaves), exact, strict=True)]
    ok = max(errors) < NEAR
    return {"ok": ok, "why": "" if ok else f"off by {max(errors):.1e}"}


if __name__ == "__main__":
    main()
