"""The families of transformers whose recurrence is not Mamba's, as small as they get, with dense layers in the place of
experts where a family has both."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from harness import shaken

CONV, DELTA_RULE = "packc.causal_conv1d.default", "packc.gated_delta_rule.default"
LIGHTNING, SCAN = "packc.linear_attention.default", "packc.linear_scan.default"

_SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "use_cache": False}
_NO_IDS = {"bos_token_id": None, "eos_token_id": None}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
_FEW = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
_LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_GROUPED = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 8,
}
_BATCHED = {"experts_implementation": "batched_mm"}  # the other knows no fp64
_EXPERTS = {
    "num_experts": 3,
    "num_experts_per_tok": 2,  # of one alone the weight is 1, and the router has no gradient
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    **_BATCHED,
}
_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_DENSE = {"mlp_layer_types": ["dense", "dense"], "moe_intermediate_size": 8, "num_local_experts": 2}


class Family(NamedTuple):
    build: Callable[[], torch.nn.Module]
    mixers: tuple[str, ...]
    """Of all layers, those of attention aside, in order."""
    masks: bool = True
    """Whether mixers see zeros at padding; left padding stays in otherwise."""


def _qwen3_next() -> torch.nn.Module:
    config = transformers.Qwen3NextConfig(
        **_SIZES, **_NO_IDS, **_HEADS, **_GROUPED, **_LAYERS, **_EXPERTS, head_dim=8, mlp_only_layers=[0, 1]
    )
    return transformers.Qwen3NextForCausalLM(config)


def _qwen3_5() -> torch.nn.Module:
    config = transformers.Qwen3_5TextConfig(**_SIZES, **_NO_IDS, **_HEADS, **_GROUPED, **_LAYERS, head_dim=8)
    return transformers.Qwen3_5ForCausalLM(config)


def _olmo_hybrid() -> torch.nn.Module:
    heads = {**_GROUPED, "linear_num_value_heads": 2}
    return transformers.OlmoHybridForCausalLM(
        transformers.OlmoHybridConfig(**_SIZES, **_NO_IDS, **_HEADS, **heads, **_LAYERS)
    )


def _kimi_linear() -> torch.nn.Module:
    heads = {**_HEADS, "num_key_value_heads": 2, "linear_head_dim": 8, "linear_num_heads": 2}
    config = transformers.KimiLinearConfig(**_SIZES, **_NO_IDS, **heads, **_LATENT, **_LAYERS, **_DENSE)
    return transformers.KimiLinearForCausalLM(config)


def _bailing_hybrid() -> torch.nn.Module:
    heads = {**_HEADS, "num_key_value_heads": 2, "head_dim": 8, "n_group": 1, "topk_group": 1}
    config = transformers.BailingHybridConfig(**_SIZES, **_NO_IDS, **heads, **_LATENT, **_LAYERS, **_DENSE)
    return transformers.BailingHybridForCausalLM(config)


def _qwen3_5_moe() -> torch.nn.Module:
    config = transformers.Qwen3_5MoeTextConfig(**_SIZES, **_NO_IDS, **_FEW, **_GROUPED, **_LAYERS, **_EXPERTS)
    return transformers.Qwen3_5MoeForCausalLM(config)


def _lara_mini() -> torch.nn.Module:
    config = transformers.LaraMiniConfig(**_SIZES, **_NO_IDS, **_FEW, **_GROUPED, **_LAYERS, **_EXPERTS)
    return transformers.LaraMiniForCausalLM(config)


_CONV_LAYERS = {"layer_types": ["conv", "full_attention"]}


def _lfm2() -> torch.nn.Module:
    config = transformers.Lfm2Config(**_SIZES, **_NO_IDS, **_HEADS, **_CONV_LAYERS, block_multiple_of=8)
    return transformers.Lfm2ForCausalLM(config)


def _lfm3() -> torch.nn.Module:
    config = transformers.Lfm3Config(**_SIZES, **_NO_IDS, **_HEADS, **_CONV_LAYERS, head_dim=8, sliding_window=4)
    return transformers.Lfm3ForCausalLM(config)


def _lfm2_moe() -> torch.nn.Module:
    experts = {"num_dense_layers": 1, "moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
    config = transformers.Lfm2MoeConfig(**_SIZES, **_NO_IDS, **_HEADS, **_CONV_LAYERS, **experts, **_BATCHED)
    return transformers.Lfm2MoeForCausalLM(config)


def _minimax() -> torch.nn.Module:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 4}
    return transformers.MiniMaxForCausalLM(
        transformers.MiniMaxConfig(**_SIZES, **_NO_IDS, **_HEADS, **_LAYERS, **experts, **_BATCHED)
    )


def _recurrent_gemma() -> torch.nn.Module:
    options = {"lru_width": 16, "attention_window_size": 4, "block_types": ["recurrent", "attention"]}
    return transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(**_SIZES, **_NO_IDS, **_HEADS, **options)
    )


FAMILIES = {
    "qwen3_next": Family(_qwen3_next, (CONV, DELTA_RULE)),
    "qwen3_5": Family(_qwen3_5, (CONV, DELTA_RULE)),
    "qwen3_5_moe": Family(_qwen3_5_moe, (CONV, DELTA_RULE)),
    "lara_mini": Family(_lara_mini, (CONV, DELTA_RULE)),
    "olmo_hybrid": Family(_olmo_hybrid, (CONV, DELTA_RULE)),
    "kimi_linear": Family(_kimi_linear, (CONV, DELTA_RULE)),
    "bailing_hybrid": Family(_bailing_hybrid, (CONV, DELTA_RULE)),
    "lfm2": Family(_lfm2, (CONV,)),
    "lfm2_moe": Family(_lfm2_moe, (CONV,)),
    "lfm3": Family(_lfm3, (CONV,)),
    "minimax": Family(_minimax, (LIGHTNING,)),
    "recurrent_gemma": Family(_recurrent_gemma, (CONV, SCAN), masks=False),
}


def tiny(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return shaken(FAMILIES[family].build())
