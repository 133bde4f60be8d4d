"""A model compiled over the ranks of a group trains as one process does on the whole padded batch."""

import itertools
from pathlib import Path

import pytest
from sequence_work import (
    documents_in_rows,
    explained,
    leaks,
    of_its_own_tokens,
    on_three_axes,
    on_two_axes,
    refusals,
    unread,
    uses,
    waits_of_a_mamba,
    worst_errors,
)

# Over three ranks, the first document of the second batch is on all.
BATCHES = [
    ["1111111111", "0001111111", "0000000011"],
    ["111111111111", "110000000000"],
    ["11011111", "11111100", "00000000"],
]
RIGHT_PADDED = [["11111111111", "11111110000", "11000000000"], ["111111111111", "110000000000"]]
TABLE = (Path(__file__).parents[2] / "docs" / "families.md").read_text().splitlines()
FAMILIES = [row.split("|")[1].strip() for row in TABLE if row.split("|")[-2:-1] and "yes" in row.split("|")[-2]]
QUICK = [("mixers", 2)]
ALL = [(name, size) for name in ("plain", "mixers", "mamba", "checkpointed", "mamba2") for size in (2, 3)]


@pytest.mark.parametrize(
    ("name", "size"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK)]
)
def test_loss_logits_and_gradients_are_those_of_one_process(ranks, name, size):
    found = ranks.run(worst_errors, size, name, BATCHES)
    for errors, graphs, _ in found:
        for each in errors:
            assert max(each.values()) < 1e-4, each
        assert graphs == 2  # the second knows B and L as sizes; how many tokens there are, none knows
    for number, tokens in enumerate([21, 14, 14]):
        here = [of_rank[number] for _, _, of_rank in found]
        assert sum(here) == tokens
        assert max(here) - min(here) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_attention_sees_what_it_sees_on_one_process(ranks, size):
    for errors, *_ in ranks.run(worst_errors, size, "attends", RIGHT_PADDED[: 4 - size]):
        for each in errors:
            assert max(each.values()) < 1e-4, each


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "size"), [*itertools.product(FAMILIES, (2, 3)), *((family, 4) for family in ("mamba2", "bamba"))]
)
def test_families_that_the_table_says_can_be_cut(ranks, family, size):
    rows = ["1111111111111111", "1111111110000000", "1100000000000000"]  # xlstm's chunks are of 16
    for errors, *_ in ranks.run(worst_errors, size, family, [rows], timeout=900):
        assert max(errors[0].values()) < 1e-4, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pools", "checkpoints", "auxiliary"])
def test_heads_of_one_token_a_row_checkpoints_and_losses_of_experts(ranks, name):
    for errors, *_ in ranks.run(worst_errors, 3, name, [["1111111111", "1111111000", "1100000000"]]):
        assert max(errors[0].values()) < 1e-4, errors


@pytest.mark.slow
def test_evaluation_hidden_states_and_accumulated_gradients(ranks):
    for errors in ranks.run(uses, 2):
        assert max(errors.values()) < 1e-4, errors


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [False, True])
def test_data_and_sequence_parallel_with_fsdp(ranks, blocks):
    for worst in ranks.run(on_two_axes, 4, blocks):
        assert worst < 1e-4


@pytest.mark.slow
def test_data_shards_and_sequence_on_three_axes(ranks):
    for worst in ranks.run(on_three_axes, 4):
        assert worst < 1e-4


@pytest.mark.slow
def test_without_a_mask_all_positions_are_tokens(ranks):
    for errors, graphs, tokens in ranks.run(worst_errors, 2, "unmasked", BATCHES[:1]):
        assert max(errors[0].values()) < 1e-4, errors
        assert (graphs, tokens) == (1, [15])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixers", "mamba", "attends"])
def test_inductor_gives_the_same(ranks, name):
    batches = RIGHT_PADDED if name == "attends" else BATCHES
    for errors, *_ in ranks.run(worst_errors, 2, name, batches, "inductor", timeout=500):
        for each in errors:
            assert max(each.values()) < 1e-4, each


def test_ddp_takes_the_mean_over_ranks(ranks):
    for errors, *_ in ranks.run(worst_errors, 2, "plain", BATCHES[:1], "aot_eager", True):
        assert max(errors[0].values()) < 1e-4, errors


def test_nothing_crosses_from_one_document_to_another(ranks):
    for found in ranks.run(leaks, 3):
        assert found == (False, False, False)


@pytest.mark.slow
def test_documents_within_rows(ranks):
    for worst in ranks.run(documents_in_rows, 3):
        assert worst < 1e-5


@pytest.mark.parametrize("outputs", ["whole", pytest.param("local", marks=pytest.mark.slow)])
def test_logits_are_computed_by_the_ranks_that_read_them(ranks, outputs):
    for untouched, errors in ranks.run(unread, 2, outputs):
        assert untouched
        assert max(errors.values()) < 1e-4, errors


def test_outputs_of_a_ranks_own_tokens(ranks):
    for errors, tokens, outside in ranks.run(of_its_own_tokens, 2):
        assert max(errors.values()) < 1e-4, errors
        assert sum(tokens) == 51
        assert tokens[0] < tokens[1]  # who has the short document, whose tokens see fewer
        assert outside.startswith("RuntimeError: a model, or one of its class, that was compiled for one packc")


def test_explain_tells_what_is_waited_for_and_what_runs_meanwhile(ranks, tmp_path):
    for text, waits, lanes in ranks.run(explained, 2, tmp_path):
        assert "  this rank   5 of 10 tokens" in text
        assert {wait.graph for wait in waits} == {"forward", "backward"}
        gathers = [wait for wait in waits if wait.op == "all_gather_into_tensor" and wait.graph == "forward"]
        assert len(gathers) == 3  # of two convolutions, and of the logits
        assert all(0 <= wait.exposed <= wait.seconds for wait in waits)
        assert any(wait.exposed < wait.seconds and wait.hidden_by for wait in waits)
        assert f"  waits       {len(waits)} (estimated" in text
        assert set(lanes) == {"compute (estimated)", "communication (estimated)"}


def test_all_states_of_a_mamba_travel_under_work(ranks):
    """A scan waits: its gate is multiplied meanwhile, and gradients of weights in the backward."""
    for waits in ranks.run(waits_of_a_mamba, 2):
        states = [wait for wait in waits if wait.op == "all_gather_into_tensor"]
        assert [wait.hidden_by[0] for wait in states] == [
            "packc.causal_conv1d", "aten.mm", "aten.mm", "packc.causal_conv1d_bwd"
        ]  # fmt: skip
        assert all(wait.exposed < 0.01 * wait.seconds for wait in states)


DIFFER = "ValueError: sequence parallel: batches or models differ between ranks: [1] have not what rank 0 has"
CANNOT = "NotPacked: packc cannot pack this graph: "
SAID = {
    "two sequences": f"{CANNOT}packc.causal_conv1d.default in the model: works on values that never meet mask: another "
    "sequence, or none",
    "statistics": f"{CANNOT}aten.batch_norm.default in the model: no rule for aten.batch_norm.default, and transpose "
    "is not zero at padding",
    "no rule": f"{CANNOT}aten.fft_fft.default in the model: no rule for aten.fft_fft.default, and add_2 is not zero at "
    "padding",
    **dict.fromkeys(("model", "dropout on one", "shapes", "failure of one", "batches", "gradients", "masks"), DIFFER),
    "attention": f"{CANNOT}aten.scaled_dot_product_attention.default in the model: "
    "looks along the sequence, and shows neither all tokens, nor those before, nor a window: runs padded",
    "chunks": f"{CANNOT}varlen_attention in chunks of documents has no form on a part of the tokens",
    "dropout": f"{CANNOT}aten.dropout.default in the model: draws random numbers",
    "states": f"{CANNOT}causal_conv1d takes or returns states of documents, of which ranks have parts",
    "few tokens": "NotPacked: 5 tokens over 3 ranks: at least 6 are needed",
    "option": "TypeError: plan: neither a DeviceMesh nor a process group: 'sequence'",
    "outputs": "ValueError: packc.sequence_outputs must be one of ('whole', 'local'), not 'none'",
    "graph break": "NotPacked: packc.sequence_outputs: what follows a graph break wants outputs of all tokens",
    "next": "no error",
}


def test_what_cannot_be_cut_is_refused_on_all_ranks_alike(ranks):
    found = ranks.run(refusals, 3)
    assert found[0] == found[1] == found[2]
    assert found[0].pop("another option").startswith("ValueError: unknown option 'packc.sequence_length'")
    assert found[0] == SAID
