"""packc's mixers, and attention, in the ways in which models call them."""

from __future__ import annotations

from fuzz.pointwise import mask_on
from fuzz.program import Axis, Value, features
from fuzz.writer import Writer


def _entering(w: Writer, width: int | None = None) -> Value | None:
    value = w.tokens(width)
    if value is not None and w.chance(0.65):
        return mask_on(w, value) or value
    return value


def convolution(w: Writer) -> None:
    value = _entering(w)
    if value is None:
        return
    size, width = w.size(value, 2), w.choose(2, 3, 4)
    weight = w.parameter(size, width)
    bias = w.parameter(size) if w.chance(0.3) else "None"
    how = w.choose("op", "op", "op", "state", "conv1d", "padded conv1d")
    activation = w.choose("None", "'silu'")
    if how == "op":
        w.add(f"packc.ops.causal_conv1d({value.name}, {weight}, {bias}, activation={activation})", value.axes, value)
    elif how == "state":
        name = w.name()
        states = {name: value.axes, f"{name}s": (features("B"), features(size), features(width - 1))}
        call = f"packc.ops.causal_conv1d({value.name}, {weight}, output_final_state=True)"
        w.write(f"{name}, {name}s = {call}", states, value)
    elif how == "conv1d":
        text = "F.conv1d({}.transpose(1, 2), {}[:, None], {}, padding={}, groups={})[..., :L].transpose(1, 2)"
        w.add(text.format(value.name, weight, bias, width - 1, size), value.axes, value)
    else:
        text = "F.conv1d(F.pad({}.mT, ({}, 0)), {}.unsqueeze(1), {}, groups={}).mT"
        w.add(text.format(value.name, width - 1, weight, bias, size), value.axes, value)


def scan(w: Writer) -> None:
    value = _entering(w)
    if value is not None:
        decay = w.tokens(w.size(value, 2))
        text = "packc.ops.linear_scan({}.sigmoid(), {})"
        if w.chance(0.15):
            start = w.input(f"i{len(w.inputs)}", (features("B"), value.axes[2]), "values")
            text = f"packc.ops.linear_scan({{}}.sigmoid(), {{}}, initial_state={start.name})"
        w.add(text.format(decay.name, value.name), value.axes, decay, value)


def selective(w: Writer) -> None:
    value = _entering(w)
    if value is None:
        return
    size = w.size(value, 2)
    delta, b, c = w.tokens(size), w.tokens(2), w.tokens(2)
    if not delta or not b or not c:
        return
    rest = w.choose("", f", D={w.parameter(size)}", f", z={delta.name}")
    given = f"{value.name}, {delta.name}, -{w.parameter(size, 2)}.exp(), {b.name}, {c.name}{rest}"
    w.add(f"packc.ops.selective_scan({given}, delta_softplus=True)", value.axes, value, delta, b, c)


def ssd(w: Writer) -> None:
    value = _entering(w)
    if value is None or w.size(value, 2) % 2:
        return
    size = w.size(value, 2)
    dt, b, c = w.tokens(2), w.tokens(3), w.tokens(3)
    if not dt or not b or not c:
        return
    rest = w.choose(
        "", f", D={w.parameter(2)}", f", dt_bias={w.parameter(2)}", f", z={value.name}.view(B, L, 2, {size // 2})"
    )
    text = (
        f"packc.ops.ssd({value.name}.reshape(B, L, 2, {size // 2}), {dt.name}, -{w.parameter(2)}.exp(), "
        f"{b.name}, {c.name}{rest}, dt_softplus=True).flatten(2)"
    )
    w.add(text, value.axes, value, dt, b, c)


def _heads(w: Writer) -> tuple[Value, Value, Value, int] | None:
    v = _entering(w)
    if v is None or w.size(v, 2) % 2:
        return None
    q, k = w.tokens(w.size(v, 2)), w.tokens(w.size(v, 2))
    return None if q is None or k is None else (q, k, v, w.size(v, 2))


def linear_attention(w: Writer) -> None:
    found = _heads(w)
    if found is None:
        return
    q, k, v, size = found
    heads = [f"{each.name}.reshape(B, L, 2, {size // 2})" for each in (q, k, v)]
    gate = w.tokens(2)
    if gate is None:
        return
    kind = w.choose("plain", "decay", "heads", "delta", "delta per channel")
    if kind == "plain":
        text = f"packc.ops.linear_attention({', '.join(heads)})"
    elif kind == "decay":
        text = f"packc.ops.linear_attention({', '.join(heads)}, F.logsigmoid({gate.name}))"
    elif kind == "heads":
        text = f"packc.ops.linear_attention({', '.join(heads)}, -{w.parameter(2)}.exp())"
    else:
        g = f"F.logsigmoid({gate.name})" if kind == "delta" else f"F.logsigmoid({heads[0]})"
        unit = f"F.normalize({heads[1]}, dim=-1)"
        text = f"packc.ops.gated_delta_rule({heads[0]}, {unit}, {heads[2]}, {g}, {gate.name}.sigmoid())"
    w.add(f"{text}.reshape(B, L, {size})", v.axes, q, k, v, gate)


def attention(w: Writer) -> None:
    found = _heads(w)
    if found is None:
        return
    q, k, v, size = found
    q_, k_, v_ = (f"{each.name}.reshape(B, L, 2, {size // 2}).transpose(1, 2)" for each in (q, k, v))
    mask = w.mask_for(v)
    causal = "torch.ones(L, L, dtype=torch.bool).tril()"
    padding = w.choose(f"{mask}.bool()[:, None, None, :]", f"({mask} != 0)[:, None, None]")
    window = "((torch.arange(L)[:, None] - torch.arange(L)).abs() < 3)"
    order = "(torch.arange(L)[:, None] >= torch.arange(L))"
    visible = w.choose(
        padding,
        f"{causal} & {padding}",
        f"{padding} & {order}",
        f"{padding} & {window}",
        f"{causal} & {window} & {padding}",
    )
    added = f"torch.where({visible}, 0.0, -1e9).double()"
    kind = w.choose("causal", "mask", "mask", "added", "written out", "dropout off", "both masks", "added truths")
    if kind == "causal":
        text = f"F.scaled_dot_product_attention({q_}, {k_}, {v_}, is_causal=True)"
    elif kind == "mask":
        text = f"F.scaled_dot_product_attention({q_}, {k_}, {v_}, {visible})"
    elif kind == "added":
        text = f"F.scaled_dot_product_attention({q_}, {k_}, {v_}, attn_mask={added})"
    elif kind == "added truths":
        text = f"((({q_} @ {k_}.mT) + ({visible})).softmax(-1) @ {v_})"
    elif kind == "dropout off":
        text = f"F.scaled_dot_product_attention({q_}, {k_}, {v_}, {visible}, dropout_p=0.0, scale=0.3)"
    elif kind == "both masks":
        both = f"{visible} & {mask}.bool()[:, None, :, None] | torch.eye(L, dtype=torch.bool)"
        text = f"F.scaled_dot_product_attention({q_}, {k_}, {v_}, {both})"
    else:
        text = f"((({q_} @ {k_}.transpose(2, 3)) * 0.5 + {added}).softmax(-1) @ {v_})"
    w.add(f"{text}.transpose(1, 2).reshape(B, L, {size})", (*v.axes[:2], Axis(".", str(size))), q, k, v)


def cross_attention(w: Writer) -> None:
    """From the tokens of one mask to those of another."""
    q = w.tokens()
    if q is None or w.size(q, 2) % 2:
        return
    own, size = w.masks_of(q), w.size(q, 2)
    other = w.pick(lambda each: each.axes == q.axes and each.dtype == "float" and not w.masks_of(each) & own)
    if other is None or len(own) != 1 or len(w.masks_of(other)) != 1:
        return
    (mask,) = w.masks_of(other)
    names = q.name, other.name, f"{other.name}.tanh()"
    q_, k_, v_ = (f"{name}.reshape(B, L, 2, {size // 2}).transpose(1, 2)" for name in names)
    keys = w.choose(f"({mask} != 0)[:, None, None]", f"{mask}.bool()[:, None, None, :].expand(B, 1, L, L)")
    text = w.choose(
        f"F.scaled_dot_product_attention({q_}, {k_}, {v_}, {keys})",
        f"(({q_} @ {k_}.mT) + torch.where({keys}, 0.0, -1e9)).softmax(-1) @ {v_}",
        f"F.scaled_dot_product_attention({q_}, {k_}, {v_})",
    )
    w.add(f"({text}).transpose(1, 2).reshape(B, L, {size})", q.axes, q, meet=False)
