"""The Mamba families of transformers, as small as they get, and what a graph of one of them holds.

Imports no packc: the tests run it in processes with and without. Run as a script it prints, as JSON, what Dynamo,
export and eager make of a tiny Mamba: ``python tiny_models.py {stock,packc-first,model-first}``.
"""

import collections
import json
import re
import sys

import torch
import transformers

# family -> (layers that hold a mixer, scans per mixer: zamba scans each head on its own)
MAMBA1 = {"mamba": (2, 1), "falcon_mamba": (2, 1), "jamba": (1, 1), "zamba": (2, 2)}
MAMBA2 = {
    "mamba2": (2, 1),
    "bamba": (1, 1),
    "falcon_h1": (2, 1),
    "granitemoehybrid": (1, 1),
    "nemotron_h": (1, 1),
    "zamba2": (2, 1),
}
MIXERS = MAMBA1 | MAMBA2


def tiny_model(family: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = _BUILD[family](**options)
    with torch.no_grad():
        # Away from the initial values: there dt is so small that nothing would depend on the state.
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def batch(length: int = 7, rows: int = 2) -> dict[str, torch.Tensor | bool]:
    """A training batch with two padded positions at the end of the first row; no cache, which export cannot return."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 32, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def counts(graph: torch.fx.Graph) -> dict[str, int]:
    """Target -> how many nodes call it."""
    calls = [re.sub(" at 0x[0-9a-f]+", "", str(node.target)) for node in graph.nodes if node.op.startswith("call_")]
    return dict(sorted(collections.Counter(calls).items()))


def _mamba(layers=2, **options) -> torch.nn.Module:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=layers, state_size=4, **options)
    return transformers.MambaForCausalLM(config)


def _falcon_mamba(**options) -> torch.nn.Module:
    config = transformers.FalconMambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, **options)
    return transformers.FalconMambaForCausalLM(config)


def _jamba(**options) -> torch.nn.Module:
    if not hasattr(transformers.integrations.moe, "_grouped_mm_fallback_backward_fake"):
        # No backend can compile the other backward of transformers 5.15.
        options.setdefault("experts_implementation", "batched_mm")
    config = transformers.JambaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=2,
        **options,
    )
    return transformers.JambaForCausalLM(config)


def _zamba(**options) -> torch.nn.Module:
    config = transformers.ZambaConfig(
        vocab_size=32,
        hidden_size=16,
        attention_hidden_size=32,
        attention_head_dim=16,
        intermediate_size=16,
        num_hidden_layers=2,
        layers_block_type=["hybrid", "hybrid"],
        num_attention_heads=2,
        num_key_value_heads=2,
        mamba_d_state=4,
        mamba_dt_rank=2,
        **options,
    )
    return transformers.ZambaForCausalLM(config)


_SIZES = {"vocab_size": 32, "hidden_size": 16}
_ATTENTION = {"intermediate_size": 16, "num_attention_heads": 2}
_SSD = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4}


def _mamba2(layers=2, **options) -> torch.nn.Module:
    config = transformers.Mamba2Config(
        **_SIZES,
        num_hidden_layers=layers,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=2,
        expand=2,
        chunk_size=4,
        **options,
    )
    return transformers.Mamba2ForCausalLM(config)


def _bamba() -> torch.nn.Module:
    options = {"num_hidden_layers": 2, "num_key_value_heads": 1, "attn_layer_indices": [1]}
    return transformers.BambaForCausalLM(transformers.BambaConfig(**_SIZES, **_ATTENTION, **_SSD, **options))


def _falcon_h1() -> torch.nn.Module:
    options = {"num_hidden_layers": 2, "num_key_value_heads": 1, "mamba_d_ssm": 32}
    return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**_SIZES, **_ATTENTION, **_SSD, **options))


def _granitemoehybrid() -> torch.nn.Module:
    config = transformers.GraniteMoeHybridConfig(
        **_SIZES,
        **_ATTENTION,
        **_SSD,
        num_hidden_layers=2,
        num_key_value_heads=1,
        layer_types=["mamba", "attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=16,
    )
    return transformers.GraniteMoeHybridForCausalLM(config)


def _nemotron_h() -> torch.nn.Module:
    config = transformers.NemotronHConfig(
        **_SIZES,
        **_ATTENTION,
        num_key_value_heads=1,
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=4,
        chunk_size=4,
        head_dim=8,
    )
    return transformers.NemotronHForCausalLM(config)


def _zamba2() -> torch.nn.Module:
    config = transformers.Zamba2Config(
        **_SIZES,
        **_ATTENTION,
        num_hidden_layers=2,
        num_key_value_heads=2,
        layers_block_type=["mamba", "hybrid"],
        mamba_d_state=4,
        n_mamba_heads=4,
        mamba_headdim=8,
        mamba_ngroups=1,
        chunk_size=4,
        num_mem_blocks=1,
    )
    return transformers.Zamba2ForCausalLM(config)


_BUILD = {name.removeprefix("_"): build for name, build in list(globals().items()) if name.removeprefix("_") in MIXERS}


def _what_is_traced() -> dict[str, object]:
    model, inputs = tiny_model("mamba", layers=1), batch(4)
    graphs = []

    def record(gm, example_inputs):
        graphs.append(gm.graph)
        return gm.forward

    def record_for_packc(gm, example_inputs):
        return record(gm, example_inputs)

    record_for_packc.__packc_backend__ = True  # type: ignore[attr-defined]
    eager = model(**inputs).logits
    torch.compile(model, backend=record, fullgraph=True)(**inputs)
    torch.compile(model, backend=record_for_packc, fullgraph=True)(**inputs)
    return {
        "eager": [value.hex() for value in eager.flatten().tolist()],
        "another backend": counts(graphs[0]),
        "packc's backend": counts(graphs[1]),
        "export": counts(torch.export.export(model, (), inputs, strict=False).graph),
        "strict export": counts(torch.export.export(model, (), inputs, strict=True).graph),
    }


if __name__ == "__main__":
    order = sys.argv[1]
    if order == "packc-first":
        assert "transformers.models.mamba.modeling_mamba" not in sys.modules
        from packc import backend
    if order == "model-first":
        tiny_model("mamba")
        from packc import backend  # noqa: F401
    print(json.dumps(_what_is_traced()))
