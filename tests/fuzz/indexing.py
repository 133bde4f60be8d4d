"""Entries that an index takes: of every token's features, or of a table by what is of every token."""

from __future__ import annotations

from fuzz.program import POSITIONS, features
from fuzz.writer import Writer


def features_taken(w: Writer) -> None:
    value = w.tokens()
    if value is None:
        return
    name, last, axes = value.name, w.size(value, 2) - 1, value.axes[:2]
    two = (*axes, features(2))
    text, made = w.choose(
        (f"{name}[:, :, [0, {last}]]", two),
        (f"{name}[..., torch.tensor([{last}, 0])]", two),
        (f"{name}.index_select(2, torch.tensor([{last}, 0]))", two),
        (f"{name}.index_select(-1, torch.tensor({last}))", (*axes, features(1))),
        (f"{name}[:, :, [[0], [{last}]]]", (*axes, features(2), features(1))),
        (f"{name}[:, :, None][..., [0, 0, 0], [0, {last}, {last}]]", (*axes, features(3))),
        (f"{name}[:, :, None, :, None][:, :, [0, 0], :, [0, 0]]", (features(2), *value.axes)),
        (f"{name}.take_along_dim({name}.argsort(-1)[..., :1], 2)", (*axes, features(1))),
    )
    w.add(text, made, value)


def table(w: Writer) -> None:
    """By the largest feature of every token, and where it is."""
    value = w.tokens()
    if value is None:
        return
    size, width, axes = w.size(value, 2), w.choose(1, 2, w.width, w.sizes[1]), value.axes[:2]
    of_features, of_rest = w.parameter(size, width), features(width)
    largest = f"{value.name}.argmax(-1)"
    text, made = w.choose(
        (f"{of_features}[{largest}]", (*axes, of_rest)),
        (f"{of_features}.T[:, {largest}]", (of_rest, *axes)),
        (f"{of_features}.index_select(0, {largest}.flatten()).view(B, L, {width})", (*axes, of_rest)),
        (f"{of_features}[{largest}, [{width - 1}]]", axes),
        (f"{of_features}[{largest}[..., None], torch.arange({width})]", (*axes, of_rest)),
        (f"{of_features}[{largest}, torch.arange(L) % {width}]", axes),
        (f"{of_features}[{largest}, torch.arange(B)[:, None] % {width}]", axes),
    )
    w.add(text, made, value)


def picked(w: Writer) -> None:
    """Places of a row, by an index of each."""
    value = w.tokens()
    if value is None:
        return
    name, axes, row = value.name, (features("B"), value.axes[2]), f"{w.mask_for(value)}.long().sum(1).sub(1)"
    last = f"{row}.clamp(min=0)"
    text, made = w.choose(
        (f"{name}[torch.arange(B), {last}]", axes),
        (f"{name}[torch.arange(B)[:, None], {last}[:, None]]", (axes[0], features(1), axes[1])),
        (f"{name}[torch.arange(B), {last} // 2]", axes),
        (f"{name}[:, [0]]", (axes[0], features(1), axes[1])),
        (f"{name}[torch.arange(B), [0]]", axes),
        (f"{name}[:, torch.arange(L)]", (axes[0], POSITIONS._replace(kind="."), axes[1])),
        (f"{name}[torch.arange(B)[:, None], torch.arange(L)]", (axes[0], POSITIONS._replace(kind="."), axes[1])),
    )
    w.add(text, made, value)
