"""Lines that look along positions or rows and are no mixers: what packc must leave padded, or refuse."""

from __future__ import annotations

from fuzz.program import POSITIONS, ROWS, Axis, are_tokens, features
from fuzz.writer import Writer

_MOVED = Axis(".", "L")
_KEEP_LENGTH = (
    *("{}.flip(1)", "{}.roll(1, 1)", "{}.cumsum(1)", "{}.softmax(1)", "{}.roll(1, 0)", "{}.cummax(1).values"),
    *("F.pad({}, (0, 0, 1, 0))[:, :-1]", "torch.cat([{}[:, 1:], {}[:, :1]], 1)"),
    *("torch.cat([torch.zeros_like({}[:, :1]), {}[:, :-1]], 1)", "F.pad({}[:, 1:], (0, 0, 0, 1))", "{}.sort(1).values"),
    *("{}[:, torch.arange(L).flip(0)]", "{} @ ({}.mT @ {}) / L", "({} @ {}.mT).tril() @ {} / L", "{}.flip(0)"),
    *(
        "torch.einsum('bld,bmd->bml', {}, {}).softmax(-1) @ {}",
        "F.layer_norm({}, {}.shape[1:], eps=0.1)",
        "{}.flip(0, 1)",
    ),
    *("{}.index_select(1, torch.arange(L - 1, -1, -1))", "{}[torch.arange(B)]", "{}.logcumsumexp(1)"),
    "F.conv1d({}.mT, torch.ones({}.shape[2], 1, 3, dtype=torch.float64), padding=1, groups={}.shape[2]).mT",
    "F.avg_pool1d({}.transpose(1, 2), 3, 1, 1).transpose(1, 2)",
    "{}.reshape(B, -1).cumsum(1).view({}.shape)",
    "{}.reshape(-1, {}.shape[-1]).cumsum(0).view({}.shape)",
    "{}.reshape(-1, {}.shape[-1]).roll(1, 0).reshape({}.shape)",
)
_MIXED_IN = (
    *("{} - {}.mean(1, keepdim=True)", "{} + {}.sum(1, keepdim=True) / 9", "{} / ({}.square().sum((0, 1)) + 1)"),
    *(
        "{} * {}.amax(1, keepdim=True)",
        "{} + {}[:, :1]",
        "{} * {}[:, -1:].sigmoid()",
        "{} - {}.mean(0)",
        "{} + {}.mean()",
    ),
    *("{} + {}.flip(1)", "{} * {}.roll(1, 1)", "{} + {}[:1]", "{} - {}.mean((0, 1))", "{} + {}.amax(0, keepdim=True)"),
    "{} - {}.roll(1, 1)",
    *("{} + {}[0]", "{} * {}.max().sigmoid()", "{} - {}.std() / 2", "{} + {}.sum((1, 2), keepdim=True) / 9"),
    *("{} - ({}.sum(1) / L)[:, None]", "{} + {}.sum() / 20", "{} + {}.view(-1).mean()", "{} + {}[:, L // 2][:, None]"),
)


def shifted(w: Writer) -> None:
    value = w.tokens()
    if value is not None:
        text = w.choose(*_KEEP_LENGTH)
        w.add(text.format(*[value.name] * 4), (features("B"), _MOVED, value.axes[2]), value)


def mixed_in(w: Writer) -> None:
    """What tokens share is added to each."""
    value = w.tokens()
    if value is None:
        return
    other = w.tokens(w.size(value, 2)) if w.chance(0.3) else value
    mask = f" * {w.mask_for(value)}[..., None]" if w.chance(0.5) else ""
    shared = f"({other.name}{mask})" if mask else other.name
    w.add(w.choose(*_MIXED_IN).format(value.name, shared), value.axes, value, other)


def masked_pool(w: Writer) -> None:
    value = w.tokens()
    if value is None:
        return
    mask, rest = w.mask_for(value), (features("B"), value.axes[2])
    name = value.name
    text = w.choose(
        f"({name} * {mask}[..., None]).sum(1) / {mask}.sum(1, keepdim=True).clamp(min=1)",
        f"({name} * {mask}[..., None]).mean(1)",
        f"({name} * {mask}[..., None]).sum(dim=1)",
        f"torch.einsum('bld,bl->bd', {name}, {mask}.double())",
        f"torch.bmm({mask}.double()[:, None], {name}).squeeze(1)",
        f"({mask}.double()[:, None] @ {name})[:, 0]",
        f"{name}.masked_fill({mask}[..., None] == 0, -1e3).amax(1).clamp(min=-5)",
        f"{name}.masked_fill({mask}[..., None] == 0, -1e3).max(1).values.clamp(min=-5)",
        f"({name} * {mask}[..., None]).amax(1)",
        f"({name} * {mask}[..., None]).transpose(1, 2).sum(-1)",
        f"({name} * {mask}[..., None]).norm(dim=1)",
    )
    pooled = w.add(text, rest, value)
    if pooled is not None and w.chance(0.4):
        w.add(f"{name} * {pooled.name}[:, None]", value.axes, value, pooled)


def pooled(w: Writer) -> None:
    """Without a mask: padding counts."""
    value = w.tokens()
    if value is not None:
        text = w.choose(
            "{}.mean(1)", "{}.sum(1) / 9", "{}.amax(1)", "{}[:, 0]", "{}[:, -1]", "{}.logsumexp(1)", "{}[:, ::2].sum(1)"
        )
        w.add(text.format(value.name), (features("B"), value.axes[2]), value)


def cut(w: Writer) -> None:
    """Some of the positions, or of the rows."""
    value = w.tokens()
    if value is None or w.sizes[1] < 3:
        return
    text, rows, length = w.choose(
        ("{}[:, :-1]", "B", "L - 1"),
        ("{}[:, 1:]", "B", "L - 1"),
        ("{}[:, ::2]", "B", "(L + 1) // 2"),
        ("{}[:, :2]", "B", "2"),
        ("{}[:, -2:]", "B", "2"),
        ("{}[:1]", "1", "L"),
        ("{}[1:]", "B - 1", "L"),
        ("{}[:, 1:] - {}[:, :-1]", "B", "L - 1"),
        ("{}[:, 1:-1]", "B", "L - 2"),
        ("{}.narrow(1, 1, L - 1)", "B", "L - 1"),
    )
    if rows == "B" or w.sizes[0] > 2:
        axes = (features(rows), features(length), value.axes[2])
        w.add(text.format(*[value.name] * 4), axes, value, cut=text if " - {}" not in text else "?")


def joined_rows(w: Writer) -> None:
    """Sequences joined end to end, or rows to rows."""
    value = w.tokens()
    if value is not None:
        text, rows, length = w.choose(
            ("torch.cat([{0}, {0}], 1)", "B", "2 * L"),
            ("torch.cat([{0}, {0} * 2], 0)", "2 * B", "L"),
            ("{}.repeat(2, 1, 1)", "2 * B", "L"),
            ("{}.repeat_interleave(2, 1)", "B", "2 * L"),
        )
        w.add(text.format(value.name), (features(rows), features(length), value.axes[2]), value)


def back_to_tokens(w: Writer) -> None:
    """A value that has been moved meets one that has not."""
    value = w.tokens()
    moved = w.pick(lambda each: [a.size for a in each.axes[:2]] == ["B", "L"] and not are_tokens(each.axes))
    if value is not None and moved is not None and value.axes[2:] == moved.axes[2:]:
        text = w.choose("{} + {}", "{} * {}.sigmoid()", "torch.where({} > 0, {}, 0.5)")
        w.add(text.format(value.name, moved.name), (ROWS, POSITIONS, value.axes[2]), value, moved)
