"""Mixtures of experts in transformers (>= 5.15): experts are functions of rows, their balancing loss one of tokens."""

from collections.abc import Callable
from typing import Any

import torch

from packc.frontends.hf import MODELING
from packc.frontends.keep_whole import Around, KeptWhole, Method
from packc.ops.grouped_mm import grouped_mm
from packc.ops.row_wise import begin_row_wise, end_row_wise


def experts_forward(
    original: Callable[..., torch.Tensor],
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Rows (tokens, D) and the experts (tokens, k) of each, with weights -> (tokens, D)."""
    rows = begin_row_wise([hidden_states, top_k_index, top_k_weights])
    return end_row_wise(original(self, *rows), hidden_states)


def grouped_product(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Rows (S, K), sorted by expert up to ``offs`` (E,), by the weights (E, K, N) -> (S, N)."""
    if input.device.type != "cpu" or weight.dtype == torch.bfloat16:  # of which torch has it
        return NotImplemented
    return grouped_mm(input.to(weight.dtype), weight, offs)


def llama4_moe(
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]], self: Any, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, L, D) -> (tokens, D) and the router's logits. The original gives every expert all tokens, one after
    the other along one axis."""
    flat = hidden_states.reshape(-1, self.hidden_dim)
    (rows,) = begin_row_wise([flat])
    out, _ = original(self, rows)
    return end_row_wise(out, flat), self.router(flat)[1]


def get_interface(self: Any, experts_implementation: str, default: Any) -> Any:
    """Experts that loop over those which are hit leave Dynamo with as many graphs; these compute the same in one."""
    return self["grouped_mm"] if experts_implementation == "eager" and _can_be_grouped() else NotImplemented


def _can_be_grouped() -> bool:
    """On CPU, releases before 5.23 ask for the sizes of groups inside of the backward, which cannot be traced."""
    from transformers.integrations import moe

    return torch.cuda.is_available() or hasattr(moe, "_grouped_mm_fallback_backward_fake")


def load_balancing_loss_func(
    gate_logits: Any,
    num_experts: int | None = None,
    top_k: int = 2,
    attention_mask: torch.Tensor | None = None,
) -> Any:
    """The share of tokens that choose an expert times its mean probability, summed over experts: equations (4) to (6)
    of https://huggingface.co/papers/2101.03961. Logits (tokens, num_experts) a layer, the mask (B, L)."""
    if not isinstance(gate_logits, tuple) or num_experts is None or attention_mask is None:
        return NotImplemented  # without a mask, padding counts too
    mask = attention_mask.reshape(-1, 1).to(gate_logits[0].device, torch.float32)
    chosen = probability = tokens = torch.zeros((), device=mask.device)
    for logits in gate_logits:
        probabilities = torch.nn.functional.softmax(logits.to(mask.device), dim=-1)
        choices = torch.nn.functional.one_hot(torch.topk(probabilities, top_k, dim=-1).indices, num_experts).sum(1)
        chosen = chosen + (choices * mask).sum(0)
        probability = probability + (probabilities.float() * mask).sum(0)
        tokens = tokens + mask.sum()
    return (chosen / tokens * (probability / tokens)).sum() * num_experts


KEPT_WHOLE: KeptWhole = {
    "transformers.integrations.moe": {
        "batched_mm_experts_forward": Around(experts_forward),
        "grouped_mm_experts_forward": Around(experts_forward),
        "_grouped_mm": grouped_product,
        "ExpertsInterface": Method("get_interface", get_interface),
    },
    "transformers.models.llama4.modeling_llama4": {"Llama4TextMoe": Method("forward", Around(llama4_moe))},
    MODELING: {"load_balancing_loss_func": load_balancing_loss_func},
}
