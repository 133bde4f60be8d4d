"""Lines whose every entry is made of entries at the same place, up to broadcasting."""

from __future__ import annotations

from fuzz.program import POSITIONS, ROWS, Axis, Value, are_tokens, features
from fuzz.writer import BATCH_SEQ, Writer

UNARY = (
    *("F.silu({})", "F.gelu({})", "F.relu({})", "{}.tanh()", "{}.sigmoid()", "-{}", "{}.abs()", "{}.square()"),
    *("{} * 0.5 + 1", "1 - {}", "{}.clamp(-1, 1)", "F.softplus({})", "{} / 3", "{}.exp().clamp(max=5)", "{}.detach()"),
    *("{}.clone()", "{}.contiguous()", "F.dropout({}, 0.3, training=False)", "{}.float().double()", "2 ** {}.tanh()"),
    *("({}.abs() + 1).log()", "({}.abs() + 0.5).rsqrt()", "F.leaky_relu({})", "{} * ({} > 0)", "torch.zeros_like({})"),
    *(
        "torch.ones_like({})",
        "torch.full_like({}, 0.5)",
        "{}.new_ones({}.shape)",
        "{} * {}.shape[-1] ** -0.5",
        "{} / L",
    ),
    *("{}.masked_fill({} < -1, 0.25)", "torch.where({} > 0, {}, 0.0)", "torch.where({} > 0, 1.0, {})", "{}.sign()"),
    *("F.hardswish({})", "torch.nan_to_num({})", "{} ** 2", "{}.type_as({})", "torch.addcmul({}, {}, {}, value=0.5)"),
    *("torch.clamp({}, min=0.1)", "{}.round()", "{} if {}.shape[0] > 2 else -{}", "torch.lerp({}, {} * 2, 0.3)"),
    *("{}.add_(0) if False else {} * 1", "{}.to(torch.float64)", "torch.maximum({}, -{})", "torch.atan2({}, {} + 9)"),
)
BINARY = (
    *("{} + {}", "{} - {}", "{} * {}", "{} / ({}.abs() + 1)", "torch.maximum({}, {})", "torch.minimum({}, {})"),
    "torch.mul(*torch.broadcast_tensors({}, {}))",
)
TERNARY = ("torch.where({} > 0, {}, {})", "torch.addcmul({}, {}, {})", "torch.lerp({}, {}, {}.sigmoid())")


def unary(w: Writer) -> None:
    value = w.floats()
    if value is not None:
        template = w.choose(*UNARY)
        w.add(template.format(*[value.name] * 4), value.axes, value)


def without_gradient(w: Writer) -> None:
    value = w.floats()
    if value is not None:
        name = w.name()
        w.write(f"with torch.no_grad():\n    {name} = {value.name} * 2", {name: value.axes}, value)


def binary(w: Writer) -> None:
    a = w.floats()
    if a is None:
        return
    same = w.chance(0.6)
    b = w.pick(lambda value: value.dtype == "float" and (not same or (value.axes == a.axes and value != a)))
    if b is not None and (axes := broadcast(w, a, b)):
        w.add(w.choose(*BINARY).format(a.name, b.name), axes, a, b)


def ternary(w: Writer) -> None:
    a = w.floats()
    others = [w.pick(lambda value: value.dtype == "float" and value.axes == a.axes) for _ in range(2)] if a else []
    if a is not None and None not in others:
        names = [a.name, *(other.name for other in others)]
        w.random.shuffle(names)
        w.add(w.choose(*TERNARY).format(*names), a.axes, a, *others)


def broadcast(w: Writer, a: Value, b: Value) -> tuple[Axis, ...] | None:
    rank = max(len(a.axes), len(b.axes))
    shapes = [(1,) * (rank - len(v.axes)) + tuple(w.scope[v.name].shape) for v in (a, b)]
    padded = [(features(1),) * (rank - len(v.axes)) + v.axes for v in (a, b)]
    axes = []
    for (x, y), (n, m) in zip(zip(*padded, strict=True), zip(*shapes, strict=True), strict=True):
        if n != m and 1 not in (n, m):
            return None
        if n == m == 1 and w.symbolic and x.kind != y.kind:
            return None
        if n != m:
            axes.append(y if n == 1 else x)
        elif x.kind == y.kind or "." in (x.kind, y.kind):
            axes.append(x if x.kind != "." else y)
        elif are_tokens(a.axes) != are_tokens(b.axes):
            axes.append(x if are_tokens(a.axes) else y)  # of the other it is a table
        else:
            axes.append(Axis(".", x.size))
    return tuple(axes)


def with_a_table(w: Writer) -> None:
    """Values that are the same for all rows, all positions, or all tokens."""
    value = w.tokens()
    if value is None:
        return
    width = w.size(value, 2)
    kind = w.choose("position", "row", "feature", "long", "arange", "row and position", "order", "learned")
    if kind == "position":
        other = w.input(f"t{len(w.inputs)}", (POSITIONS, features(width)), "values")
        w.add(f"{value.name} + {w.choose('', '1.5 * ')}{other.name}", value.axes, value)
    elif kind == "row":
        other = w.input(f"r{len(w.inputs)}", (ROWS, features(width)), "values")
        text = w.choose(
            f"{other.name}[:, None]", f"{other.name}.unsqueeze(1)", f"{other.name}[:, None].expand(-1, L, -1)"
        )
        w.add(f"{value.name} * {text}.sigmoid()", value.axes, value)
    elif kind == "feature":
        w.add(f"{value.name} {w.choose('+', '*')} {w.parameter(width)}", value.axes, value)
    elif kind == "long":
        w.add(f"{value.name} + {w.parameter(40, width)}[:L]", value.axes, value)
    elif kind == "arange":
        text = w.choose(
            "torch.arange(L)[None, :, None]", "torch.arange(L)[:, None] / L", "torch.arange(B)[:, None, None]"
        )
        w.add(f"{value.name} * {text}", value.axes, value)
    elif kind == "row and position":
        other = w.input(f"s{len(w.inputs)}", BATCH_SEQ, "values")
        w.add(f"{value.name} * {other.name}[..., None].sigmoid()", value.axes, value, other)
    elif kind == "learned":
        w.add(f"{value.name} + F.embedding(torch.arange(L), {w.parameter(40, width)})", value.axes, value)
    else:
        places = w.choose(
            "torch.arange(L)", f"{w.mask}.long().cumsum(1) - 1", f"({w.mask}.long().cumsum(-1) - 1).clamp(min=0)"
        )
        w.add(f"{value.name} + F.embedding(({places}) % 8, {w.parameter(8, width)})", value.axes, value)


def masked(w: Writer) -> None:
    """A mask multiplied on, or filled with."""
    value = w.tokens()
    if value is not None:
        mask_on(w, value)


def mask_on(w: Writer, value: Value) -> Value | None:
    mask = w.mask_for(value)
    template = w.choose(
        *["{} * {}[..., None]"] * 4,
        *("{} * {}.unsqueeze(-1)", "{1}[:, :, None] * {0}", "{}.masked_fill({}[..., None] == 0, 0.0)"),
        *(
            "torch.where({1}[..., None] != 0, {0}, 0.0)",
            "{} * {}.bool()[..., None]",
            "{} * {}.to(torch.float64)[..., None]",
        ),
        *("{}.masked_fill(~{}.bool()[..., None], 0.0)", "{} * ({}[..., None] != 0).double()", "{} * {}.view(B, L, 1)"),
        *(
            "{}.masked_fill({}.bool()[..., None].logical_not(), 0)",
            "{} * {}.unsqueeze(-1).expand_as({})",
            "{} * (1 - (1 - {}.double()))[..., None]",
        ),
        *(
            "({}.transpose(1, 2) * {}[:, None]).transpose(1, 2)",
            "torch.where({1}[..., None] > 0, {0}, torch.zeros_like({0}))",
        ),
    )
    names = [value.name, mask, value.name]
    return w.add(template.format(*names), value.axes, value)
