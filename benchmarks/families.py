"""The model families that packc is measured on, and the table of what becomes of each: docs/families.md.

    python benchmarks/families.py              # print the table, measured now on tiny models
    python benchmarks/families.py --write      # and put it into docs/families.md

Models come from configurations with random weights. A family is one line of FAMILIES.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers

if TYPE_CHECKING:
    from packc.report import Report

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- measured by benchmarks/families.py -->", "<!-- end -->"
HEADER = "| family | packed mixers | runs padded | | sequence parallel |\n|---|---|---|---|---|"


class Family(NamedTuple):
    model: str
    """The class in transformers; its configuration's is read off it."""
    options: Callable[[int, int], dict[str, Any]]
    """(hidden size, layers) -> what the configuration has besides COMMON."""
    config: str | None = None
    """The configuration's class, where the model's name does not say it."""


def common(hidden: int, layers: int) -> dict[str, Any]:
    return {"vocab_size": 512, "hidden_size": hidden, "num_hidden_layers": layers, "pad_token_id": 0} | {
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }


def heads(hidden: int, _: int) -> dict[str, Any]:
    return {"intermediate_size": 2 * hidden, "num_attention_heads": 4, "num_key_value_heads": 2}


def headed(hidden: int, layers: int) -> dict[str, Any]:
    return {**heads(hidden, layers), "head_dim": hidden // 4}


def experts(hidden: int, _: int) -> dict[str, Any]:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden // 2}


def ssd(hidden: int, _: int) -> dict[str, Any]:
    sizes = {"n_heads": 4, "d_head": hidden // 2, "n_groups": 1, "d_state": 16, "chunk_size": 64}
    return {f"mamba_{name}": size for name, size in sizes.items()}


def every_fourth(first: str, second: str, layers: int) -> list[str]:
    """Mostly the first kind of layer; the last one is of the second, as in the published models."""
    return [second if (layer + 1) % min(4, layers) == 0 else first for layer in range(layers)]


def delta_rule(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": hidden // 4,
        "linear_value_head_dim": hidden // 4,
        "layer_types": every_fourth("linear_attention", "full_attention", layers),
    }


def latent(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "num_key_value_heads": 4,
        "kv_lora_rank": hidden // 4,
        "qk_rope_head_dim": hidden // 8,
        "qk_nope_head_dim": hidden // 8,
        "v_head_dim": hidden // 4,
        "mlp_layer_types": ["dense"] * layers,
        "moe_intermediate_size": hidden // 2,
        "num_local_experts": 2,
        "layer_types": every_fourth("linear_attention", "full_attention", layers),
    }


def inkling2(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "unpadded_vocab_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": hidden // 4,
        "sliding_window_size": 64,
        "d_rel": 4,
        "rel_extent": 64,
        "moe_intermediate_size": hidden // 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_layers_per_attn_res_block": 1,
        "layer_types": every_fourth("hybrid_sliding", "hybrid", layers),
    }


# Fused attention neither caps scores, as gemma2 does, nor knows the sinks of gpt_oss.
written_out = {"attn_implementation": "eager"}
FAMILIES = {
    "mamba": Family("MambaForCausalLM", lambda h, n: {}),
    "falcon_mamba": Family("FalconMambaForCausalLM", lambda h, n: {}),
    "jamba": Family(
        "JambaForCausalLM",
        lambda h, n: {**heads(h, n), "num_experts": 4, "attn_layer_period": n, "attn_layer_offset": n - 1},
    ),
    "zamba": Family(
        "ZambaForCausalLM",
        lambda h, n: {
            "attention_hidden_size": 2 * h,
            "attention_head_dim": h // 2,
            "intermediate_size": 2 * h,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "mamba_dt_rank": h // 16,
            "layers_block_type": ["hybrid"] * n,
        },
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        lambda h, n: {"state_size": 16, "num_heads": 4, "head_dim": h // 2, "n_groups": 2, "chunk_size": 64},
    ),
    "bamba": Family("BambaForCausalLM", lambda h, n: {**heads(h, n), **ssd(h, n), "attn_layer_indices": [n - 1]}),
    "zamba2": Family(
        "Zamba2ForCausalLM",
        lambda h, n: {
            "intermediate_size": 2 * h,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_mamba_heads": 4,
            "mamba_d_state": 16,
            "mamba_headdim": h // 2,
            "mamba_ngroups": 1,
            "chunk_size": 64,
            "num_mem_blocks": 1,
            "layers_block_type": every_fourth("mamba", "hybrid", n),
        },
    ),
    "falcon_h1": Family("FalconH1ForCausalLM", lambda h, n: {**heads(h, n), **ssd(h, n), "mamba_d_ssm": 2 * h}),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        lambda h, n: {
            **headed(h, n),
            "mamba_num_heads": 4,
            "mamba_head_dim": h // 2,
            "n_groups": 1,
            "ssm_state_size": 16,
            "chunk_size": 64,
            "num_hidden_layers": 2 * n,
            "layers_block_type": [kind for layer in every_fourth("mamba", "attention", n) for kind in (layer, "mlp")],
        },
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        lambda h, n: {
            **heads(h, n),
            **ssd(h, n),
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": h,
            "layer_types": every_fourth("mamba", "attention", n),
        },
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM", lambda h, n: {**heads(h, n), "layer_types": every_fourth("conv", "full_attention", n)}
    ),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        lambda h, n: {
            **heads(h, n),
            **experts(h, n),
            "num_dense_layers": 1,
            "layer_types": every_fourth("conv", "full_attention", n),
        },
    ),
    "lfm3": Family(
        "Lfm3ForCausalLM",
        lambda h, n: {
            **headed(h, n),
            "sliding_window": 64,
            "layer_types": every_fourth("conv", "full_attention", n),
        },
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        lambda h, n: {
            **headed(h, n),
            **delta_rule(h, n),
            **experts(h, n),
            "shared_expert_intermediate_size": h,
        },
    ),
    "qwen3_5": Family(
        "Qwen3_5ForCausalLM", lambda h, n: {**headed(h, n), **delta_rule(h, n)}, config="Qwen3_5TextConfig"
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForCausalLM",
        lambda h, n: {**headed(h, n), **delta_rule(h, n), **experts(h, n), "shared_expert_intermediate_size": h},
        config="Qwen3_5MoeTextConfig",
    ),
    "qwen4_exp": Family(
        "Qwen4ExpForCausalLM",
        lambda h, n: {
            **headed(h, n),
            **delta_rule(h, n),
            **experts(h, n),
            "shared_expert_intermediate_size": h,
            "eos_token_id": 1,
            "hc_count": 2,
            "hc_lowrank": h // 4,
            "ple_layer_ids": [1],
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 64,
            "split_ngram_parts": 1,
            "layer_types": ["linear_attention"] * n,  # Dynamo breaks at every query of the others
        },
        config="Qwen4ExpTextConfig",
    ),
    "olmo_hybrid": Family(
        "OlmoHybridForCausalLM", lambda h, n: {**heads(h, n), **delta_rule(h, n), "linear_num_value_heads": 2}
    ),
    "lara_mini": Family(
        "LaraMiniForCausalLM",
        lambda h, n: {**headed(h, n), **delta_rule(h, n), **experts(h, n), "shared_expert_intermediate_size": h},
    ),
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        lambda h, n: {**heads(h, n), **latent(h, n), "linear_head_dim": h // 4, "linear_num_heads": 4},
    ),
    "bailing_hybrid": Family(
        "BailingHybridForCausalLM",
        lambda h, n: {**headed(h, n), **latent(h, n), "n_group": 1, "topk_group": 1},
    ),
    "glm5_next": Family(
        "Glm5NextForConditionalGeneration",
        lambda h, n: {
            "text_config": {
                **common(h, n),
                **latent(h, n),
                "intermediate_size": 2 * h,
                "num_attention_heads": 4,
                "q_lora_rank": h // 2,
                "qk_rope_head_dim": 0,
                "num_experts_per_tok": 2,
                "linear_head_dim": h // 4,
                "linear_num_heads": 4,
                "hc_mult": 2,
                "hc_sinkhorn_iters": 2,
                "index_topk": 8,
                "index_head_dim": h // 4,
                "index_n_heads": 2,
                "index_kpool": 4,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": h,
                "intermediate_size": h,
                "num_heads": 4,
                "out_hidden_size": h,
                "projection_intermediate_size": h,
            },
        },
        config="Glm5NextConfig",
    ),
    "minimax": Family(
        "MiniMaxForCausalLM",
        lambda h, n: {
            **headed(h, n),
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 64,
            "layer_types": every_fourth("linear_attention", "full_attention", n),
        },
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaForCausalLM",
        lambda h, n: {
            "intermediate_size": 6 * h,
            "num_attention_heads": 4,
            "lru_width": h,
            "attention_window_size": 64,
            "block_types": every_fourth("recurrent", "attention", n),
        },
    ),
    "rwkv": Family("RwkvForCausalLM", lambda h, n: {"context_length": 512}),
    "xlstm": Family("xLSTMForCausalLM", lambda h, n: {"num_heads": 4, "chunk_size": 16, "mode": "train"}),
    "zaya": Family(
        "ZayaForCausalLM",
        lambda h, n: {**headed(h, n), **experts(h, n), "num_experts_per_tok": 1, "router_hidden_size": h},
    ),
    "inkling": Family(
        "InklingForCausalLM",
        lambda h, n: {
            **headed(h, n),
            "moe_intermediate_size": h // 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "inkling2": Family("Inkling2ForCausalLM", inkling2, config="Inkling2TextConfig"),
    "inkling2_loop": Family(
        "Inkling2LoopForCausalLM",
        lambda h, n: {
            **inkling2(h, n),
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
            "num_hidden_layers": 3,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 2,
            "loop_num_passes": 2,
            "loop_gate_rank": 8,
        },
        config="Inkling2LoopTextConfig",
    ),
    "llama": Family("LlamaForCausalLM", headed),
    "qwen3": Family("Qwen3ForCausalLM", headed),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        lambda h, n: {
            **headed(h, n),
            "sliding_window": 64,
            "layer_types": every_fourth("sliding_attention", "full_attention", n),
        },
        config="Gemma3TextConfig",
    ),
    "mixtral": Family(
        "MixtralForCausalLM", lambda h, n: {**headed(h, n), "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", lambda h, n: {**headed(h, n), **experts(h, n)}),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        lambda h, n: {
            **heads(h, n),
            **latent(h, n),
            "q_lora_rank": h // 2,
            "layer_types": None,
            "mlp_layer_types": ["sparse"] * n,
            "first_k_dense_replace": 0,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "gemma2": Family("Gemma2ForCausalLM", lambda h, n: {**headed(h, n), "sliding_window": 64, **written_out}),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        lambda h, n: {**headed(h, n), **written_out, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2": Family("GPT2LMHeadModel", lambda h, n: {"n_embd": h, "n_layer": n, "n_head": 4}),
    "bert": Family(
        "BertForMaskedLM",
        lambda h, n: {"intermediate_size": 2 * h, "num_attention_heads": 4},
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        lambda h, n: {"intermediate_size": 2 * h, "num_attention_heads": 4, "local_attention": 64},
    ),
}


def configuration(name: str, hidden: int = 256, layers: int = 4) -> dict[str, Any]:
    return {**common(hidden, layers), **FAMILIES[name].options(hidden, layers)}


def build(name: str, hidden: int = 256, layers: int = 4) -> torch.nn.Module:
    """The family's model of this size, in training."""
    family = FAMILIES[name]
    model = getattr(transformers, family.model)
    config = getattr(transformers, family.config) if family.config else model.config_class
    return model(config(**configuration(name, hidden, layers))).train()


def batch(rows: list[int], length: int, vocab: int = 512) -> dict[str, torch.Tensor]:
    """Rows of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(length) < torch.tensor(rows)[:, None]).long()
    ids = torch.randint(1, vocab, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def row(name: str) -> str:
    """The family's row of the table, measured on a tiny model."""
    import packc

    torch.manual_seed(0)
    torch._dynamo.reset()
    model, given = build(name, 32, 2), batch([16, 9, 4], 16)
    report = packc.explain(model)(**given)
    packed = _ops(each.op for each in report.mixers if each.packed)
    return f"| {name} | {packed} | {_padded(report)} | {_rest(report)} | {_on_ranks(model, given)} |"


def _on_ranks(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> str:
    """What `packc.sequence` makes of it, over two ranks: known of its graphs, before anything is computed."""
    from packc.compiler import pack_graph
    from packc.passes import NoMask, NotPackable, Ranks

    refused, whole = [], []

    def looking(gm: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Any:
        try:
            found = pack_graph(gm, inputs, for_documents=True, ranks=Ranks("two", 2))
            whole.extend(each.node for each in found.requirements.boundaries)
        except (NoMask, NotPackable) as reason:
            refused.append(str(reason))
        return gm.forward

    looking.__packc_backend__ = True  # type: ignore[attr-defined]
    torch._dynamo.reset()  # or frames behind a graph break are those that were compiled to explain
    torch.compile(model, backend=looking)(**given)
    if refused:
        return f"no: {_short(refused[0])}"
    return "yes" if not whole else f"yes; {_ops(whole)} on all tokens"


def _ops(names: Any) -> str:
    return ", ".join(f"`{name.removesuffix('.default')}`" for name in sorted(set(names))) or "-"


def _padded(report: Report) -> str:
    if report.tokens is None:
        return "everything"
    mixers = [mixer.op for mixer in report.mixers if not mixer.packed]
    return _ops([*(boundary.node for boundary in report.boundaries), *mixers])


def _rest(report: Report) -> str:
    graphs = f"{report.graphs} graphs" if report.graphs > 1 else ""
    padded = dict.fromkeys(boundary.reason for boundary in report.boundaries if report.tokens is not None)
    fallback = _short(report.fallback or "")
    if report.graphs > 2:
        without_mask = re.sub(r"(padding mask among the inputs) \[[^]]*\]", r"\1 of some", fallback)
        fallback = "; ".join(dict.fromkeys(without_mask.split("; ")))
    return "; ".join(filter(None, [graphs, *map(_short, padded), fallback]))


def _short(reason: str) -> str:
    return re.sub(", and [a-z_0-9]+ is not zero at padding", "", reason).replace("|", "/")


def table(rows: list[str]) -> str:
    return "\n".join([BEGIN, HEADER, *rows, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    options = parser.parse_args()
    rows = []
    for name in FAMILIES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows.append(row(name))
    print(table(rows))
    if options.write:
        text = DOCUMENT.read_text()
        before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
        DOCUMENT.write_text(before + table(rows) + after)


if __name__ == "__main__":
    main()
