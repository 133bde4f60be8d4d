"""Indexers of sparse attention that score pools of tokens, of which transformers drops those that no row fills.

How many are left the data alone knows, so Dynamo breaks the graph there, once a layer. Here all stay, and only those
that some row fills are chosen among: of equal scores, topk takes others where there are more of them.
"""

from typing import Any

import torch
from torch.nn import functional as F

from packc.frontends.keep_whole import KeptWhole, Method
from packc.ops.topk_among import topk_among


def indexer(
    self: Any,
    hidden_states: torch.Tensor,
    q_resid: torch.Tensor,
    attention_mask: torch.Tensor,
    cache: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """(B, L, topk): the tokens that each query attends to, in whole pools of the tokens before it; -1 for none."""
    if cache is not None or args or kwargs:
        return NotImplemented
    with torch.no_grad():
        L, size = attention_mask.shape[1], self.index_kpool
        keys = self.k_norm(self.wk(hidden_states))
        gates = F.linear(hidden_states, self.index_kpool_compress_gate)
        place, is_token = _pools(attention_mask, size)
        flat = place.clamp(max=L - 1).flatten(1)[..., None].expand(-1, -1, keys.shape[-1])
        keys, gates = (each.gather(1, flat).unflatten(1, (-1, size)) for each in (keys, gates))
        gates = (gates.float() + self.index_kpool_compress_ape.float()).masked_fill(~is_token[..., None], -torch.inf)
        keys = (gates.softmax(2).nan_to_num().to(keys.dtype) * keys).sum(2)

        queries = self.wq_b(q_resid).unflatten(-1, (-1, self.head_dim))
        scores = F.relu(queries.float() @ keys.mT.float().unsqueeze(1) * self.softmax_scale)
        weights = self.weights_proj(hidden_states.to(self.weights_proj.weight.dtype)).float() * self.n_heads**-0.5
        scores = (weights.unsqueeze(-2) @ scores).squeeze(-2)
        filled = is_token.all(-1)
        behind = place[:, None, :, -1] <= torch.arange(L, device=place.device)[:, None]
        may = filled[:, None] & behind
        scores = scores.masked_fill(~may, torch.finfo(scores.dtype).min)

        chosen = topk_among(scores, filled.any(0), min(self.index_topk // size, place.shape[1]))
        is_chosen = (chosen >= 0) & may.gather(-1, chosen.clamp(min=0))
        inside = torch.arange(size, device=place.device)
        tokens = place[:, :1, :1, None] + chosen[..., None] * size + inside
        tokens = tokens.masked_fill(~is_chosen[..., None], -1).flatten(-2)
        width = self.index_topk
        if self.index_kpool_always_select_tail:
            visible = self.get_visible_tokens(valid_keys=attention_mask, q_length=L, current_length=L)
            tokens = self.append_visible_tail(tokens, visible, attention_mask)
            width += size - 1
        tokens = F.pad(tokens, (0, width - tokens.shape[-1]), value=-1)
        return tokens.masked_fill(~attention_mask[..., None], -1).to(torch.int32)


def _pools(attention_mask: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, P, size)``: the positions of each pool, counted from a row's first token, and whether they are tokens."""
    L = attention_mask.shape[1]
    pools = (L + size - 1) // size
    counted = torch.arange(pools * size, device=attention_mask.device).view(pools, size)
    place = attention_mask.long().argmax(-1)[:, None, None] + counted
    is_token = attention_mask.gather(1, place.clamp(max=L - 1).flatten(1)).unflatten(1, (-1, size))
    return place, is_token & (place < L)


KEPT_WHOLE: KeptWhole = {
    "transformers.models.glm5_next.modeling_glm5_next": {"Glm5NextTextIndexer": Method("forward", indexer)}
}
