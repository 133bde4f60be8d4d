"""Recurrences that transformers writes as a loop in a method: over blocks (MiniMax) or over time (RecurrentGemma)."""

from typing import Any

import torch

from packc import ops
from packc.frontends.keep_whole import KeptWhole, Method


def lightning_attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any,
    attention_mask: torch.Tensor | None,
    cache: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Linear attention with one decay a head and no scale (https://arxiv.org/abs/2401.04658), in a gated block."""
    if args or kwargs.get("past_key_values") is not None:  # what the cache was called
        return NotImplemented
    qkv = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
    q, k, v = qkv.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim)).split(self.head_dim, dim=3)
    result: Any = ops.linear_attention(
        q,
        k,
        v,
        -self.slope_rate.flatten(),
        scale=1.0,
        initial_state=None if cache is None else cache.get_linear_cache(self.layer_idx),
        output_final_state=True,
    )
    out, state = result
    state = state.to(v.dtype)
    if cache is not None:
        cache.set_linear_cache(self.layer_idx, state)
    out = torch.sigmoid(self.output_gate(hidden_states)) * self.norm(out.flatten(2))
    return self.out_proj(out), state


def rg_lru(self: Any, activations: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A real-gated linear recurrent unit (https://arxiv.org/abs/2402.19427), ``h[t] = a[t] h[t-1] + x[t]``.

    Without a state to start from the model runs without a cache; it leaves none behind then, where the original leaves
    one that the next run with a cache throws away.
    """
    if args or kwargs:
        return NotImplemented
    reset = position_ids[:, :, None] == 0
    rows = activations.reshape(-1, self.num_attention_heads, self.block_width).permute(1, 0, 2)

    def gate(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        of_heads = torch.baddbmm(bias[:, None, :], rows, weight)
        return torch.sigmoid(of_heads.transpose(0, 1).reshape(activations.shape))

    strength = gate(self.recurrent_gate_weight, self.recurrent_gate_bias)
    log_decay = -8.0 * strength * torch.nn.functional.softplus(self.recurrent_param)
    kept = _square_root(1 - torch.exp(2 * log_decay))
    x = activations * gate(self.input_gate_weight, self.input_gate_bias) * (reset + ~reset * kept).type_as(activations)
    state = self.recurrent_states
    result: Any = ops.linear_scan(
        torch.exp(log_decay) * ~reset, x, initial_state=state, output_final_state=state is not None
    )
    out, self.recurrent_states = (result, None) if state is None else result
    return out


def _square_root(x: torch.Tensor) -> torch.Tensor:
    """With a derivative of at most 1000, in ops that have one."""
    derivative = torch.rsqrt(torch.clip(4.0 * x, min=1e-6))
    return torch.sqrt(x).detach() + (x - x.detach()) * derivative.detach()


_MODELS = "transformers.models"
KEPT_WHOLE: KeptWhole = {
    f"{_MODELS}.minimax.modeling_minimax": {"MiniMaxLightningAttention": Method("forward", lightning_attention)},
    f"{_MODELS}.recurrent_gemma.modeling_recurrent_gemma": {"RecurrentGemmaRglru": Method("forward", rg_lru)},
}
