"""Which weights attention drops: a function of a seed and of where a weight is, so that all who ask find the same.

The generator is Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), counter-based.
Its key is the seed; a counter is the query and a quarter of the key (both counted in their document), the head, and the
document (its place in ``cu_seqlens``), and gives a word to each of four keys. ``csrc/attention_dropout.h`` does so too.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def draw_seed() -> Tensor:
    """An int64 ``()`` on the CPU, from torch's default generator."""
    return torch.randint(SEEDS, (), dtype=torch.int64)


SEEDS = 2**62
"""Seeds are below."""


def factors(seed: Tensor, document: int, H: int, L: int, dropout_p: float, like: Tensor) -> Tensor:
    """``(H, L, L)``, of head, query and key: 0 for what is dropped, ``1 / (1 - dropout_p)`` for what is kept."""
    return factors_between(seed, document, H, range(L), range(L), dropout_p, like)


def factors_between(
    seed: Tensor, document: int, H: int, queries: range, keys: range, dropout_p: float, like: Tensor
) -> Tensor:
    """The same of some queries and keys, by their places in the document."""
    threshold = int(dropout_p * 2**32)
    kept = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    head, query = torch.arange(H, device=like.device), torch.arange(queries.start, queries.stop, device=like.device)
    key = torch.arange(-(-keys.stop // 4), device=like.device)
    counter = torch.broadcast_tensors(query[:, None], key, head[:, None, None], torch.full_like(head[:1], document))
    seed = seed.to(like.device).reshape(())
    words = torch.stack(philox(counter, (seed & _WORD, seed >> 32 & _WORD)), -1).flatten(-2)[
        ..., keys.start : keys.stop
    ]
    return torch.where(words < threshold, 0.0, kept).to(like.dtype)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits from four and a key of two, all int64 tensors."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        # The upper half of a product is right although it may overflow into the sign.
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32 & _WORD) ^ b ^ low, second & _WORD, (first >> 32 & _WORD) ^ d ^ high, first & _WORD
        low, high = low + 0x9E3779B9 & _WORD, high + 0xBB67AE85 & _WORD
    return a, b, c, d
