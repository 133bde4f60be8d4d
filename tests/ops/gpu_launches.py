"""What gpu_targets.py compiles: per op, named calls on meta tensors of the size and strides that models have."""

import torch

CALLS: dict[str, dict] = {}


def documents_of_tokens():
    from packc.ops.tritonsrc.documents import document_of_token

    for dtype in (torch.int32, torch.int64):
        document_of_token(torch.empty(65, dtype=dtype, device="meta"), 100_000)


CALLS["documents"] = {"packed": documents_of_tokens}
