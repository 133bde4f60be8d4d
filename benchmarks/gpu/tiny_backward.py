"""One small forward and backward of an op, for compute-sanitizer to watch."""

from __future__ import annotations

from typing import Any

import cases
import torch
from telling import each, parser


def main() -> None:
    args = parser(__doc__).parse_args()
    of_op = {case.op: case for case in cases.CASES if case.form == "packed"}

    def facts_of(name: str) -> dict[str, Any]:
        results = cases.make(of_op[name], [5, 65], args.dry).results()
        wrong = [each for each, x in results.items() if not x.isfinite().all()]
        return {"ok": not wrong, "why": f"{', '.join(wrong)}: not finite" if wrong else ""}

    if not args.only:
        args.only = ["selective_scan"]
    torch.manual_seed(0)
    each(args, of_op, facts_of)


if __name__ == "__main__":
    main()
