"""Inductor trains over many shapes after two compilations, and a second process finds these in torch's caches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, torch, packc
from harness import BOTH, LEFT, RIGHT, assert_same_step, batch_of, exact_step, tiny_mamba, train_step
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = tiny_mamba(layers=1)
compiled = torch.compile(model, backend="packc", options={"packc.strict": True})
losses = []
for step, (rows, times) in enumerate([(RIGHT, 1), (LEFT, 2), (BOTH, 3), (RIGHT, 5)]):
    batch = batch_of(["".join(token * times for token in row) for row in rows])
    with torch._dynamo.config.patch(error_on_recompile=step > 1):
        results = train_step(compiled, batch)
    assert_same_step(results, exact_step(model, batch), batch["attention_mask"])
    losses.append(results["loss"].item())
cache = counters["aot_autograd"]
print(json.dumps({"losses": losses, **{k: cache[f"autograd_cache_{k}"] for k in ("hit", "miss", "bypass", "saved")}}))
"""


def run(cache: Path) -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_inductor_trains_over_many_shapes_and_a_second_process_compiles_nothing(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    assert (first["hit"], first["bypass"]) == (0, 0)
    assert first["saved"] == first["miss"] == 2
    assert (second["hit"], second["miss"], second["bypass"]) == (2, 0, 0)
    assert second["losses"] == first["losses"]
