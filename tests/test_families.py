"""docs/families.md says of every family what is measured."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

import packc

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import families  # noqa: E402

TABLE = families.DOCUMENT.read_text()
QUICK = ("mamba2", "granitemoehybrid", "modernbert")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in families.FAMILIES]
)
def test_the_table_says_what_becomes_of_a_family(family):
    assert families.row(family) in TABLE.splitlines()


PACK_WHOLE = TABLE[TABLE.index("Beside those of the table") : TABLE.index("(`tests/test_families.py`)")].split("`")[
    1::2
]
SIZES = dict.fromkeys(("hidden_size", "intermediate_size", "embedding_size"), 32) | {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
    "sliding_window": 5,
    "type_vocab_size": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
}


OWN_SIZES = {
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4, "n_routed_experts": 4}
    | dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "gptj": {"rotary_dim": 4},
    "llama4_text": {"attention_chunk_size": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PACK_WHOLE)
def test_a_model_that_is_said_to_pack_whole_does(name):
    torch._dynamo.reset()
    sizes = {**SIZES, **OWN_SIZES.get(name, {})}
    if name == "falcon":
        del sizes["head_dim"]  # a property there
    config = transformers.CONFIG_MAPPING[name](**sizes)
    kinds = transformers.models.auto.modeling_auto
    causal = name not in ("electra", "eurobert", "roberta", "xlm-roberta")
    names = kinds.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if causal else kinds.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    model = getattr(transformers, names[name])(config).train()
    mask = (torch.arange(12) < torch.tensor([12, 7, 4])[:, None]).long()
    ids = torch.randint(1, 64, mask.shape) * mask
    report = packc.explain(model)(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert (report.fallback, report.tokens, report.boundaries) == (None, 23, [])
    assert [mixer.packed for mixer in report.mixers] == [True, True]


def test_every_row_is_of_a_family():
    rows = TABLE[TABLE.index(families.BEGIN) : TABLE.index(families.END)].splitlines()[3:]
    assert [row.split("|")[1].strip() for row in rows] == list(families.FAMILIES)


def test_the_readme_knows_the_table():
    assert "docs/families.md" in (ROOT / "README.md").read_text()
