"""What gpu_targets.py compiles: per op, named calls on meta tensors of the size and strides that models have.

The first call of an op is the one that takes most registers.
"""

import torch

CALLS: dict[str, dict] = {}


def place():
    return torch.empty(1, dtype=torch.int64, device="meta")


def documents_of_tokens():
    from packc.ops.tritonsrc.documents import document_of_token

    for dtype in (torch.int32, torch.int64):
        document_of_token(torch.empty(65, dtype=dtype, device="meta"), 100_000)


CALLS["documents"] = {"packed": documents_of_tokens}


def selective_scan(dtype, packed, stateful, optional=True, N=16):
    """Forward and backward of a Mamba layer: u contiguous, the others slices of projections, delta channel-first."""
    from packc.ops.selective_scan import triton_backward, triton_forward
    from packc.ops.tritonsrc import segments

    segments._processors = lambda device: 132  # tensors on meta have no device to ask

    T, D = 100_000, 5120

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def fp32(*shape):
        return tensor(*shape, dtype=torch.float32)

    def run():
        u, delta = tensor(1, T, D), tensor(1, D, T).transpose(1, 2)
        B, C = tensor(1, T, 160 + 2 * N)[..., 160:].chunk(2, -1)
        z = tensor(1, T, 2 * D)[..., D:]
        arguments = (u, delta, fp32(D, N), B, C, *((fp32(D), z, fp32(D)) if optional else (None, None, None)), optional)
        documents = tensor(65, dtype=torch.int32) if packed else None
        state = fp32(64 if packed else 1, D, N) if stateful else None
        _, final, chunk_states = triton_forward.forward(*arguments, documents, state, stateful)
        triton_backward.backward(
            tensor(1, T, D), final if stateful else None, chunk_states, *arguments, documents, state, True
        )

    return run


def selective_scan_summary():
    from packc.ops.selective_scan import triton_summary
    from packc.ops.tritonsrc import segments

    segments._processors = lambda device: 132

    T, D, N = 100_000, 5120, 16
    u, A, bias = (torch.empty(shape, device="meta") for shape in ((1, T, D), (D, N), D))
    delta, z = torch.empty(1, D, T, device="meta").transpose(1, 2), torch.empty(1, T, 2 * D, device="meta")[..., D:]
    B, C = torch.empty(1, T, 160 + 2 * N, device="meta")[..., 160:].chunk(2, -1)
    triton_summary.summary(u, delta, A, B, bias, True, place())
    triton_summary.adjoint(u, delta, A, C, z, bias, True, place())


CALLS["selective_scan"] = {
    "fp32, packed, stateful": selective_scan(torch.float32, True, True),
    "fp32, summary": selective_scan_summary,
    "bf16, packed": selective_scan(torch.bfloat16, True, False),
    "bf16, rows, stateful": selective_scan(torch.bfloat16, False, True),
    "bf16, packed, 64 states": selective_scan(torch.bfloat16, True, False, N=64),
    "fp16, packed, bare": selective_scan(torch.float16, True, False, optional=False),
}


def causal_conv1d(dtype, packed, stateful, channel_first=False, W=4):
    """Forward and backward of a Mamba layer: x half of a projection, or channel-first."""
    from packc.ops.causal_conv1d import triton_op

    T, D = 100_000, 5120

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def run():
        x = tensor(1, D, T).transpose(1, 2) if channel_first else tensor(1, T, 2 * D)[..., :D]
        documents = tensor(65, dtype=torch.int32) if packed else None
        state = tensor(64 if packed else 1, D, W - 1, dtype=torch.float32) if stateful else None
        common = (x, tensor(D, W), None if stateful else tensor(D), True, documents, state)
        triton_op.forward(*common, stateful)
        triton_op.backward(tensor(1, T, D), state, *common)

    return run


CALLS["causal_conv1d"] = {
    "fp32, packed, stateful": causal_conv1d(torch.float32, True, True),
    "bf16, packed": causal_conv1d(torch.bfloat16, True, False),
    "bf16, rows, channel-first": causal_conv1d(torch.bfloat16, False, False, channel_first=True),
}


def linear_attention(dtype, packed, K, V, ssd=False, H=64):
    """Forward and backward of lightning attention's heads, or of a Mamba-2 layer's."""
    from packc.ops.linear_attention import triton_backward, triton_forward

    T, G = 100_000, 8 if ssd else H

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def fp32(*shape):
        return tensor(*shape, dtype=torch.float32)

    def run():
        tokens = (tensor(1, T, G, K), tensor(1, T, G, K), tensor(1, T, 2 * H, V)[:, :, H:])
        per_head = (
            (fp32(1, T, H), fp32(1, T, H), fp32(H, V)) if ssd else (fp32(1, T, H) if packed else None, None, None)
        )
        documents = tensor(65, dtype=torch.int32) if packed else None
        count = 64 if packed else 1
        state = fp32(count, H, V, K) if ssd else fp32(count, H, K, V)
        _, final, kept = triton_forward.forward(*tokens, *per_head, 0.1, documents, state, True, ssd, True)
        triton_backward.backward(tensor(1, T, H, V), final, kept, *tokens, *per_head, 0.1, documents, state, ssd)

    return run


def linear_attention_summary(T=100_000, H=64, G=8, K=128, V=64):
    from packc.ops.linear_attention import triton_summary

    q, k = torch.empty(1, T, 2 * G, K, dtype=torch.bfloat16, device="meta").chunk(2, 2)
    v, g = torch.empty(1, T, H, V, dtype=torch.bfloat16, device="meta"), torch.empty(1, T, H, device="meta")
    triton_summary.summary(k, v, g, g, True, place())
    triton_summary.adjoint(v, q, g, 0.1, True, place())


CALLS["linear_attention"] = {
    "bf16, ssd, packed": linear_attention(torch.bfloat16, True, 128, 64, ssd=True),
    "bf16, ssd, summary": linear_attention_summary,
    "fp32, ssd, packed": linear_attention(torch.float32, True, 128, 64, ssd=True),
    "bf16, packed": linear_attention(torch.bfloat16, True, 128, 128),
    "bf16, rows": linear_attention(torch.bfloat16, False, 128, 128),
    "fp16, rows, one head, no decay": linear_attention(torch.float16, False, 32, 64, H=1),
}


def gated_delta_rule(dtype, packed, per_channel):
    """Forward and backward of a Gated DeltaNet layer, or of a Kimi Delta Attention layer's."""
    from packc.ops.gated_delta_rule import triton_backward, triton_forward

    T, H, G, K, V = 100_000, 32, 32 if per_channel else 16, 128, 128

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def fp32(*shape):
        return tensor(*shape, dtype=torch.float32)

    def run():
        q, k = tensor(1, T, G, 2 * K).chunk(2, -1)
        g = fp32(1, T, H, K) if per_channel else fp32(1, T, H)
        documents = tensor(65, dtype=torch.int32) if packed else None
        state = fp32(64 if packed else 1, H, K, V)
        arguments = (q, k, tensor(1, T, H, V), g, fp32(1, T, H), 0.1, documents, state)
        _, final, kept = triton_forward.forward(*arguments, True)
        triton_backward.backward(tensor(1, T, H, V), final, kept, *arguments)

    return run


def gated_delta_rule_summary(dtype):
    from packc.ops.gated_delta_rule import triton_summary

    def run(T=100_000, H=32, K=128, V=128):
        q, k = torch.empty(1, T, H, 2 * K, dtype=dtype, device="meta").chunk(2, -1)
        v, beta = torch.empty(1, T, H, V, dtype=dtype, device="meta"), torch.empty(1, T, H, device="meta")
        for g in (beta, torch.empty(1, T, H, K, device="meta")):
            triton_summary.summary(k, v, g, beta, place())
            triton_summary.adjoint(v, q, k, g, beta, 0.1, place())

    return run


CALLS["gated_delta_rule"] = {
    "fp32, per channel, packed": gated_delta_rule(torch.float32, True, True),
    "fp32, summary": gated_delta_rule_summary(torch.float32),
    "bf16, summary": gated_delta_rule_summary(torch.bfloat16),
    "bf16, per channel, packed": gated_delta_rule(torch.bfloat16, True, True),
    "fp16, per head, packed": gated_delta_rule(torch.float16, True, False),
    "bf16, per head, rows": gated_delta_rule(torch.bfloat16, False, False),
}


def linear_scan(a_dtype, b_dtype, packed, stateful, D=4096):
    """Forward and backward of an RG-LRU layer: a contiguous, b half of a projection."""
    from packc.ops.linear_scan import triton_backward, triton_forward
    from packc.ops.tritonsrc import segments

    segments._processors = lambda device: 132

    T = 100_000

    def tensor(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def run():
        a, b = tensor(1, T, D, dtype=a_dtype), tensor(1, T, 2 * D, dtype=b_dtype)[..., D:]
        documents = tensor(65, dtype=torch.int32) if packed else None
        state = tensor(64 if packed else 1, D, dtype=torch.float32) if stateful else None
        out, final, kept = triton_forward.forward(a, b, documents, state, stateful)
        triton_backward.backward(out, final if stateful else None, kept, a, b, documents, state)

    return run


def linear_scan_summary(T=100_000, D=4096):
    from packc.ops.linear_scan import triton_summary
    from packc.ops.tritonsrc import segments

    segments._processors = lambda device: 132

    a, b = torch.empty(1, T, D, device="meta"), torch.empty(1, T, 2 * D, dtype=torch.bfloat16, device="meta")[..., D:]
    triton_summary.summary(a, b, place())
    triton_summary.adjoint(b, a, place())


CALLS["linear_scan"] = {
    "fp32, packed, stateful": linear_scan(torch.float32, torch.float32, True, True),
    "fp32 and bf16, summary": linear_scan_summary,
    "fp32 and bf16, packed": linear_scan(torch.float32, torch.bfloat16, True, False),
    "bf16, rows, stateful": linear_scan(torch.bfloat16, torch.bfloat16, False, True),
    "fp32, one channel": linear_scan(torch.float32, torch.float32, True, True, D=1),
}


def pack(dtype, view):
    """Activations of a model packed, and scattered back."""
    from packc.ops.pack import triton_op

    def run():
        index = torch.empty(100_000, dtype=torch.int64, device="meta")
        x = view(torch.empty(64, 2048, 5120, dtype=dtype, device="meta"))
        triton_op.unpack(triton_op.pack(x, index), index, 64, 2048)

    return run


CALLS["pack"] = {
    "bf16": pack(torch.bfloat16, lambda x: x),
    "fp32, part of each row": pack(torch.float32, lambda x: x[:, 1:]),
    "bf16, channel-first": pack(torch.bfloat16, lambda x: x.mT.contiguous().mT),
    "token ids": pack(torch.int64, lambda x: x[:, :, 0]),
}
