"""A model that packs by itself is exported with sizes of any value, and AOTInductor runs it, ops of packc included."""

import subprocess
import sys

import pytest
import torch
from harness import masks
from torch import nn

from packc import ops


class PacksByItself(nn.Module):
    """Rows with a mask, packed by hand around mixers of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.taps, self.A = nn.Parameter(torch.randn(8, 4)), nn.Parameter(-torch.rand(2))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        index, cu_seqlens = ops.packing_index(mask)
        x = ops.pack(self.tokens(ids), index)
        x = ops.causal_conv1d(x, self.taps, activation="silu", cu_seqlens=cu_seqlens)
        heads = x.view(1, -1, 2, 4)
        x = x + ops.varlen_attention(heads, heads, heads, cu_seqlens=cu_seqlens).flatten(2)
        B, C = x[..., None, :4], x[..., None, 4:]
        x = x + ops.ssd(heads, x[..., :2].sigmoid(), self.A, B, C, cu_seqlens=cu_seqlens).flatten(2)
        return ops.unpack(self.head(x), index, *ids.shape)


IN_ANOTHER_PROCESS = """
import sys, torch
{imports}
batch, wanted = torch.load(sys.argv[2])
with torch.no_grad():
    got = torch._inductor.aoti_load_package(sys.argv[1])(*batch)
torch.testing.assert_close(got, wanted)
"""


def batch(rows):
    mask = masks(rows)
    return torch.randint(32, mask.shape), mask


def exported():
    torch.manual_seed(0)
    model = PacksByItself().eval()
    sizes = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("L", min=2, max=512)}
    with torch.no_grad():
        return model, torch.export.export(model, batch(["11100", "11111"]), dynamic_shapes=(sizes, sizes))


def test_an_exported_model_packs_batches_of_all_sizes():
    model, program = exported()
    ops_of = {str(node.target) for node in program.graph.nodes}
    assert {"packc.pack.default", "packc.ssd.default", "packc.varlen_attention.default"} <= ops_of
    for rows in (["1100", "1111", "0111"], ["11111111", "10000000"]):
        given = batch(rows)
        torch.testing.assert_close(program.module()(*given), model(*given))


@pytest.mark.slow  # Inductor writes C++
def test_aotinductor_runs_it_wherever_packcs_ops_are_imported(tmp_path):
    model, program = exported()
    package, data, given = str(tmp_path / "model.pt2"), str(tmp_path / "data"), batch(["1100", "1111", "0111"])
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    torch.save((given, model(*given).detach()), data)

    def run(imports):
        script = IN_ANOTHER_PROCESS.format(imports=imports)
        return subprocess.run([sys.executable, "-c", script, package, data], capture_output=True, text=True)

    assert run("import packc.ops").returncode == 0
    assert "Could not find schema for packc::" in run("").stderr
