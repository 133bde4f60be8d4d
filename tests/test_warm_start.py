"""A second process finds the compiled graphs of the first in torch's caches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, torch, packc
from harness import LEFT, RIGHT, batch_of, tiny_mamba, train_step
from torch._dynamo.utils import counters
torch.manual_seed(0)
compiled = torch.compile(tiny_mamba(layers=1), backend="packc", options={"packc.strict": True})
losses = [train_step(compiled, batch_of(["".join(c * n for c in row) for row in rows]))["loss"].item()
          for rows, n in ((RIGHT, 1), (LEFT, 2), (RIGHT, 3))]
cache = counters["aot_autograd"]
print(json.dumps({"losses": losses, **{k: cache[f"autograd_cache_{k}"] for k in ("hit", "miss", "bypass", "saved")}}))
"""


def run(cache: Path) -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_second_process_compiles_nothing(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    assert (first["hit"], first["bypass"]) == (0, 0)
    assert first["saved"] == first["miss"] == 2
    assert (second["hit"], second["miss"], second["bypass"]) == (2, 0, 0)
    assert second["losses"] == first["losses"]
