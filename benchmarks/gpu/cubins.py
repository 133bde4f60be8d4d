"""Where no kernel runs: which of the compiled ones load at all, and what registers and spills the driver sees."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from telling import each, parser


def main() -> None:
    args = parser(__doc__).parse_args()
    found = sorted(Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin"))
    files = {f"{file.stem} {file.parent.name[:8]}": file for file in found}

    def facts_of(name: str) -> dict[str, Any]:
        from triton.runtime import driver

        told = json.loads(files[name].with_suffix(".json").read_text())
        _, _, registers, spills, threads = driver.active.utils.load_binary(
            told["name"], files[name].read_bytes(), told["shared"], 0
        )
        return {"ok": True, "registers": registers, "spills": spills, "threads": threads}

    if args.dry:
        print(f"{len(files)} kernels, which only a GPU loads")
        return
    each(args, files, facts_of)


if __name__ == "__main__":
    main()
