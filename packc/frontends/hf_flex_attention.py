"""FlexAttention in transformers (>= 5.15): a graph that makes the mask and attends by it, where theirs are several."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from packc.frontends.keep_whole import KeptWhole

_BLOCK = 128


def flex_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The original asks the batch whether it has padding, and compiles a function of its own: both break the graph."""
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import masking_utils

    if args or mask_function is None or kwargs.get("use_vmap"):
        return NotImplemented
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        mask_function = masking_utils.and_masks(mask_function, masking_utils.padding_mask_function(padding))
    sees = masking_utils.add_offsets_to_mask_function(mask_function, q_offset, kv_offset)

    def of_broadcast_indices(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return sees(b, h, q, k)

    def all_blocks(of: int, others: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For each block of ``of`` tokens, how many of ``others`` it meets, and which: none is said to be empty."""
        rows, columns = -(-of // _BLOCK), -(-others // _BLOCK)
        number = torch.full((batch_size, 1, rows), columns, dtype=torch.int32, device=device)
        which = torch.arange(columns, dtype=torch.int32, device=device)
        return number, which.expand(batch_size, 1, rows, columns)

    keys, queries = all_blocks(q_length, kv_length), all_blocks(kv_length, q_length)
    return BlockMask(
        (q_length, kv_length),
        *(*keys, None, None, *queries, None, None),
        BLOCK_SIZE=(_BLOCK, _BLOCK),
        mask_mod=of_broadcast_indices,
    )


def flex_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """q (B, H, L, K), k (B, G, L, K), v (B, G, L, V) -> (B, L, H, V), by the mask that the ``BlockMask`` is made of."""
    from torch.nn.attention.flex_attention import BlockMask

    others = (position_bias, kwargs.get("kernel_options"), kwargs.get("output_attentions") or None)
    if args or kwargs.get("dropout", 0.0) > 0 or any(each is not None for each in others):
        return NotImplemented
    # Another's function may want to be asked about one query and key at a time.
    if not isinstance(attention_mask, BlockMask) or attention_mask.mask_mod.__name__ != "of_broadcast_indices":
        return NotImplemented
    (batch, _, queries, _), keys = query.shape, key.shape[2]
    b, h, q, k = (torch.arange(size, device=query.device) for size in (batch, 1, queries, keys))
    seen = attention_mask.mask_mod(b[:, None, None, None], h[:, None, None], q[:, None], k)
    mask = seen.expand(batch, 1, queries, keys)
    if softcap is None and s_aux is None:
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=grouped)
    else:
        out = _written_out(query, key, value, mask, scaling, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What fused attention does not: capped scores, and ``sinks (H,)``. 0 of a query that sees no key, as of Flex."""
    from transformers.integrations.flex_attention import repeat_kv

    heads = query.shape[1]
    key, value = (repeat_kv(each, heads // each.shape[1]) for each in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = scores.to(torch.promote_types(query.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + torch.where(seen, 0.0, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.ops.aten._safe_softmax.default(scores, -1)
    return weights[..., : key.shape[2]].to(value.dtype) @ value


KEPT_WHOLE: KeptWhole = {
    "transformers.masking_utils": {"flex_attention_mask": flex_attention_mask},
    "transformers.integrations.flex_attention": {"flex_attention_forward": flex_attention_forward},
}
