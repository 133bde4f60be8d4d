"""Products, reductions of features, and lookups: every token by itself."""

from __future__ import annotations

from fuzz.program import Value, are_tokens, features
from fuzz.writer import Writer


def _last(w: Writer) -> tuple[Value, int] | None:
    """A value whose last axis are features, and how many."""
    value = w.pick(lambda each: each.dtype == "float" and each.axes[-1].kind == "." and each.axes[-1].size.isdigit())
    return None if value is None else (value, w.size(value, -1))


def linear(w: Writer) -> None:
    found = _last(w)
    if found is None:
        return
    value, size = found
    out = w.choose(w.width, w.width, 1, 2, 4, w.sizes[0], w.sizes[1])
    text = w.choose(
        *("F.linear({v}, {w}.T)", "{v} @ {w}", "{v} @ {w}", "torch.matmul({v}, {w})", "F.linear({v}, {w}.T, {b})"),
        *("torch.addmm({b}, {v}, {w})", "torch.mm({v}, {w})", "torch.einsum('...d,de->...e', {v}, {w})"),
        *("torch.einsum('bld,de->ble', {v}, {w})", "torch.einsum('bld,de->bel', {v}, {w}).mT", "({w}.T @ {v}.mT).mT"),
        *("torch.tensordot({v}, {w}, dims=1)", "torch.tensordot({w}, {v}, ([0], [-1]))", "torch.inner({v}, {w}.T)"),
        *("torch.einsum('...d,de', {v}, {w})", "torch.einsum('...cd,de->...ce', {v}, {w})"),
    )
    weight = w.parameter(size, out)
    bias = w.parameter(out) if "{b}" in text else ""
    axes = (*value.axes[:-1], features(out))
    if text.startswith("torch.tensordot({w}"):
        axes = (features(out), *value.axes[:-1])
    w.add(text.format(v=value.name, w=weight, b=bias) + " * 0.7", axes, value)


def of_tokens(w: Writer) -> None:
    """Products within each token."""
    a = w.tokens()
    b = w.tokens() if a else None
    if a is None or b is None:
        return
    n, m = w.size(a, 2), w.size(b, 2)
    outer = (*a.axes, features(m))
    kind = w.choose("outer", "matmul", "einsum", "bmm", "inner")
    if kind == "outer":
        w.add(f"{a.name}[..., None] * {b.name}[:, :, None]", outer, a, b)
    elif kind == "matmul":
        w.add(f"{a.name}.unsqueeze(-1) @ {b.name}.unsqueeze(-2)", outer, a, b)
    elif kind == "einsum":
        w.add(f"torch.einsum('bld,ble->blde', {a.name}, {b.name})", outer, a, b)
    elif kind == "bmm":
        text = f"torch.bmm({a.name}.reshape(B * L, {n}, 1), {b.name}.reshape(B * L, 1, {m})).view(B, L, {n}, {m})"
        w.add(text, outer, a, b)
    elif n == m:
        w.add(f"torch.einsum('bld,bld->bl', {a.name}, {b.name})", a.axes[:2], a, b)


def of_features(w: Writer) -> None:
    found = _last(w)
    if found is None:
        return
    value, size = found
    name, axes = value.name, value.axes
    weight = w.parameter(size) if w.chance(0.5) else "None"
    text, result = w.choose(
        ("{}.softmax(-1)", axes),
        ("{}.log_softmax(-1)", axes),
        ("{}.cumsum(-1)", axes),
        ("{}.flip(-1)", axes),
        ("{}.roll(1, -1)", axes),
        ("{}.sort(-1).values", axes),
        ("{}.sum(-1)", axes[:-1]),
        ("{}.mean(-1, keepdim=True)", (*axes[:-1], features(1))),
        ("{0} - {0}.mean(-1, keepdim=True)", axes),
        ("{}.amax(-1)", axes[:-1]),
        ("{}.max(-1).values", axes[:-1]),
        ("{}.logsumexp(-1, keepdim=True)", (*axes[:-1], features(1))),
        ("{0} * torch.rsqrt({0}.pow(2).mean(-1, keepdim=True) + 1e-3)", axes),
        (f"F.layer_norm({{}}, ({size},), {weight}, eps=0.1)", axes),
        (f"F.rms_norm({{}}, ({size},), {weight}, eps=0.1)", axes),
        (f"F.normalize({{}}, dim=-1) * {size}", axes),
        ("F.pad({}, (1, 0))", (*axes[:-1], features(size + 1))),
        ("F.pad({}, (0, 2))[..., 1:]", (*axes[:-1], features(size + 1))),
        ("{}.gather(-1, {}.argsort(-1))", axes),
        ("torch.take_along_dim({}, {}.argsort(-1), -1)", axes),
        ("{}.topk(1, -1).values", (*axes[:-1], features(1))),
        ("{}.argmax(-1, keepdim=True).double()", (*axes[:-1], features(1))),
        (f"F.one_hot({{}}.argmax(-1), {size}).double()", axes),
        ("{}.var(-1)", axes[:-1]),
        ("{}.std(-1, keepdim=True)", (*axes[:-1], features(1))),
        ("{}.norm(dim=-1)", axes[:-1]),
        ("({} > 0).any(-1).double()", axes[:-1]),
        (f"{{}}.index_select(-1, torch.arange({size}))", axes),
        (f"{{}}[..., torch.arange({size})]", axes),
        ("torch.tril({}[..., None] * {}[..., None, :])", (*axes, features(size))),
        ("{}.prod(-1)", axes[:-1]),
        ("{}.unfold(-1, 2, 1)", (*axes[:-1], features(size - 1), features(2))),
    )
    if not (("var" in text or "std" in text or "unfold" in text) and size < 2) and result:
        w.add(text.format(*[name] * 4), result, value)


def of_other_axes(w: Writer) -> None:
    """Of features that are not the last axis, or of several."""
    value = w.pick(lambda each: each.dtype == "float" and len(each.axes) > 2)
    if value is None:
        return
    free = [n for n, axis in enumerate(value.axes) if axis.kind == "."]
    if free:
        at = w.choose(*free)
        rest = (*value.axes[:at], *value.axes[at + 1 :])
        kept = (*value.axes[:at], features(1), *value.axes[at + 1 :])
        text, axes = w.choose(
            (f"{value.name}.sum({at})", rest),
            (f"{value.name}.mean({at - len(value.axes)}, keepdim=True)", kept),
            (f"{value.name}.softmax({at})", value.axes),
            (f"{value.name}.cumsum({at})", value.axes),
            (f"{value.name}.select({at}, 0)", rest),
            (f"{value.name}.amax({at})", rest),
            (f"{value.name}.flip({at})", value.axes),
        )
        w.add(text, axes, value)


def lookup(w: Writer) -> None:
    ids = w.pick(lambda each: each.dtype == "int" and are_tokens(each.axes))
    if ids is not None:
        table = w.parameter(12, w.width)
        text = w.choose(f"F.embedding({ids.name} % 12, {table})", f"{table}[{ids.name} % 12]")
        w.add(text, (*ids.axes, features(w.width)), ids)


def numbers(w: Writer) -> None:
    """Whole numbers or truths of a value."""
    value = w.floats()
    if value is not None:
        text = w.choose("({} > 0).long()", "{} > 0.1", "{}.round().clamp(0, 5).long()", "({} > 0).long() + 1")
        w.add(text.format(value.name), value.axes, value)
