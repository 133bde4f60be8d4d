"""The ops' kernels at models' widths, against fp64: bf16 then fp32, packed, in rows, with states.

Right is what is no further from fp64 than twice plain torch in the same dtype, or 1e-5 of the largest entry. Memory is
full of NaN before a kernel writes it; three calls in a row give equal bits, of which the first may tune; a NaN stays in
its document; and documents within a long pack come out as they do alone.
"""

from __future__ import annotations

from typing import Any

import cases
import torch
from cases import Inputs
from launching import as_asked, count_misses
from mixers import exactly, only, positions
from selective_scan_data import relative_error
from telling import each, parser

from packc import config

LEAST = 1e-5  # of the largest entry: what no computation in fp32 is asked to beat
LONG = " long"  # ends the names of the cases of long packs


def main() -> None:
    args = parser(__doc__).parse_args()
    as_asked()
    missed = count_misses()
    of_name = {case.name: case for case in cases.CASES}
    long = {case.name + LONG: case for case in cases.CASES if case.form == "packed"}

    def facts_of(name: str) -> dict[str, Any]:
        torch.manual_seed(0)
        before = missed.copy()
        facts = long_pack(long[name], args.dry) if name in long else short(of_name[name], args.dry)
        new = missed - before
        return facts | {"missed": {kernel: n for kernel, n in new.items() if kernel}}

    poison_memory()
    each(args, [*of_name, *long], facts_of)


def poison_memory() -> None:
    """From now on memory is NaN before it is written: what was there before might happen to be right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def judged(inputs: Inputs, results: dict[str, torch.Tensor]) -> dict[str, Any]:
    """By fp64, and by what plain torch makes of the same inputs."""
    exact = exactly(inputs.mixer, inputs.tensors, *inputs.arguments(), output_final_state=inputs.state is not None)
    with config.patch(kernels="reference"):
        plain = inputs.results()
    errors = {name: relative_error(x, exact[name]) for name, x in results.items()}
    allowed = {name: max(LEAST, 2 * relative_error(x, exact[name])) for name, x in plain.items()}
    # A NaN is neither more nor less than anything.
    wrong = [name for name, error in errors.items() if not error <= allowed[name]]
    worst = max(wrong or errors, key=lambda name: errors[name] / allowed[name])
    return {
        "ok": not wrong,
        "why": f"{', '.join(wrong)}: {errors[worst]:.1e}, allowed {allowed[worst]:.1e}" if wrong else "",
        "error": {name: float(f"{error:.2e}") for name, error in errors.items()},
        "allowed": float(f"{allowed[worst]:.2e}"),
    }


def short(case: cases.Case, dry: bool) -> dict[str, Any]:
    inputs = cases.make(case, cases.compared_lengths(case), dry)
    first, second, third = (inputs.results() for _ in range(3))
    facts = judged(inputs, first)
    wrong = [facts["why"]] if facts["why"] else []
    moved = [name for name, x in first.items() if not (same(x, second[name]) and same(x, third[name]))]
    if moved:
        wrong.append(f"{', '.join(moved)}: other bits in another call")
    if case.form == "packed" and (touched := _nan_travels(inputs, first)):
        wrong.append(f"{', '.join(touched)}: touched by a NaN of another document")
    return facts | {"ok": not wrong, "why": "; ".join(wrong)}


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Bit for bit, NaN or not."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(integer).equal(y.contiguous().view(integer))


def _nan_travels(inputs: Inputs, clean: dict[str, torch.Tensor]) -> list[str]:
    """The results that are other in a document when a token of the one in front of it is NaN."""
    parts = positions(inputs.lengths)
    bad = next(n for n, length in enumerate(inputs.lengths) if length > 64)
    others = [part for n, part in enumerate(parts) if n != bad]
    per_token = inputs.mixer.per_token()
    tensors = dict(inputs.tensors)
    for name in per_token:
        tensors[name] = tensors[name].clone()
        tensors[name][:, parts[bad].start + 2] = torch.nan
    poisoned = inputs._replace(tensors=tensors).results()
    return [
        name
        for name in ("out", *(f"d{name}" for name in per_token))
        if not all(same(poisoned[name][:, part], clean[name][:, part]) for part in others)
    ]


def long_pack(case: cases.Case, dry: bool) -> dict[str, Any]:
    """Documents in the middle and at the end of many, against fp64 of the document alone."""
    lengths, middle = cases.long_pack(512 if dry else cases.TOKENS)
    inputs = cases.make(case, lengths, dry)
    results, parts = inputs.results(), positions(lengths)
    facts: dict[str, Any] = {}
    names = ["out", *(f"d{name}" for name in inputs.mixer.per_token())]
    for n in (middle, len(lengths) - 1):
        alone = inputs._replace(
            tensors=only(inputs.mixer, inputs.tensors, parts[n]),
            lengths=[lengths[n]],
            cu_seqlens=None,
            dout=inputs.dout[:, parts[n]],
        )
        facts = judged(alone, {name: results[name][:, parts[n]] for name in names})
        if not facts["ok"]:
            return facts | {"why": f"document {n}: {facts['why']}"}
    return facts


if __name__ == "__main__":
    main()
