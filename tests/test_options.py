"""Options: on the module, for a block, for one model, in the environment."""

import os
import subprocess
import sys

import pytest
import torch
from harness import RIGHT, batch_of, masks, tiny_mamba

import packc
from packc.options import split_options


def test_keys_of_packc_are_split_from_the_inner_backends():
    own, inner = split_options({"packc.strict": True, "max_autotune": False})
    assert own == {"strict": True}
    assert inner == {"max_autotune": False}


def test_an_unknown_key_raises_and_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'packc.strct'.*did you mean packc.strict\?"):
        split_options({"packc.strct": True})


def test_an_unknown_key_raises_through_torch_compile():
    with pytest.raises(Exception, match="packc.nonsense"):
        torch.compile(tiny_mamba(), backend="packc", options={"packc.nonsense": 1})(**batch_of(RIGHT))


def test_a_process_wide_option_of_one_model_raises():
    with pytest.raises(ValueError, match=r"set packc.config.kernels"):
        split_options({"packc.kernels": "reference"})


def test_an_unknown_option_of_inductor_raises():
    with pytest.raises(Exception, match="no_such_option"):
        torch.compile(tiny_mamba(), backend="packc", options={"no_such_option": 1})(**batch_of(RIGHT))


def test_the_environment_sets_defaults():
    script = "import packc; print(packc.config.strict, packc.config.kernels)"
    environment = {**os.environ, "PACKC_STRICT": "1", "PACKC_KERNELS": "reference"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "reference"]


def test_a_mask_of_another_name_is_found_when_named():
    def model(x, keep):
        return packc.ops.causal_conv1d(x * keep[..., None], torch.ones(4, 2))

    x, keep = torch.randn(3, 8, 4), masks(RIGHT)
    assert packc.explain(model)(x, keep).tokens is None
    with packc.config.patch(mask="keep"):
        torch._dynamo.reset()
        assert packc.explain(model)(x, keep).tokens == 15


def test_a_named_mask_that_is_not_there_raises():
    with pytest.raises(Exception, match="has no input 'keep'; it has .*attention_mask"):
        torch.compile(tiny_mamba(), backend="packc", options={"packc.mask": "keep"})(**batch_of(RIGHT))


def test_the_backend_is_registered_by_name():
    assert torch._dynamo.lookup_backend("packc") is packc.backend
