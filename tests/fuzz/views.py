"""Lines that rearrange, part and join."""

from __future__ import annotations

from fuzz.program import TOKENS, Axis, Value, are_tokens, features
from fuzz.writer import Writer


def permuted(w: Writer) -> None:
    value = w.pick(lambda each: len(each.axes) > 1)
    if value is None:
        return
    rank = len(value.axes)
    if w.chance(0.15):
        a, b = w.random.randrange(rank), w.random.randrange(rank)
        axes = list(value.axes)
        axes.insert(b, axes.pop(a))
        text = f"{value.name}.movedim({w.choose(a, a - rank)}, {b})"
    elif w.chance(0.6):
        a, b = w.random.sample(range(rank), 2)
        axes = list(value.axes)
        axes[a], axes[b] = axes[b], axes[a]
        text = f"{value.name}.transpose({w.choose(a, a - rank)}, {b})"
        if {a, b} == {rank - 1, rank - 2} and w.chance(0.3):
            text = f"{value.name}.mT"
        elif w.chance(0.2):
            text = f"{value.name}.swapaxes({a}, {b})"
    else:
        order = w.random.sample(range(rank), rank)
        axes, text = [value.axes[axis] for axis in order], f"{value.name}.permute({', '.join(map(str, order))})"
    w.add(text + w.choose("", "", ".contiguous()"), axes, value)


def regrouped(w: Writer) -> None:
    """One axis parted, two neighbours joined, or an axis of size one put in."""
    value = w.pick()
    if value is None:
        return
    axes = list(value.axes)
    kind, at = w.choose("part", "part", "join", "join", "one", "back"), w.random.randrange(len(axes))
    if kind == "back":
        at = next((n for n, axis in enumerate(axes) if axis.kind in "TF"), at)
        kind = "part"
    if kind == "one":
        new = [*axes[:at], features(1), *axes[at:]]
    elif kind == "part":
        new = [*axes[:at], *_parted(w, value, at), *axes[at + 1 :]]
    elif at + 1 < len(axes):
        new = [*axes[:at], _joined(axes[at], axes[at + 1]), *axes[at + 2 :]]
    else:
        return
    sizes = [axis.size for axis in new]
    if w.chance(0.4):
        sizes[w.random.randrange(len(sizes))] = "-1"
    call = w.choose("reshape", "reshape", "view")
    text = f"{value.name}.{call}({', '.join(sizes)})"
    if kind == "join" and w.chance(0.4):
        text = f"{value.name}.flatten({at}, {at + 1})"
    if kind == "part" and len(new) == len(axes) + 1 and w.chance(0.3):
        text = f"{value.name}.unflatten({at}, ({new[at].size}, {new[at + 1].size}))"
    w.add(text, new, value)


def _parted(w: Writer, value: Value, at: int) -> list[Axis]:
    axis, size = value.axes[at], w.size(value, at)
    if axis.kind == "T":
        return [Axis("B", "B"), Axis("L", "L")]
    if axis.kind == "F":
        rest = axis.size.removeprefix("B * L * ")
        return w.choose([TOKENS, features(rest)], [Axis("B", "B"), Axis("L", "L"), features(rest)])
    if axis.kind == "." and axis.size.isdigit():
        parts = [n for n in range(2, size) if size % n == 0]
        if parts:
            first = w.choose(*parts)
            return [features(first), features(size // first)]
    return [axis]


def _joined(a: Axis, b: Axis) -> Axis:
    if (a.kind, b.kind) == ("B", "L"):
        return TOKENS
    if "1" in (a.size, b.size):
        return a if b.size == "1" else b
    size = " * ".join(each if each.isalnum() else f"({each})" for each in (a.size, b.size))
    if a.kind in "TF" and b.kind == "." and b.size.isdigit():
        return Axis("F", size)
    if a.size.isdigit() and b.size.isdigit():
        size = str(int(a.size) * int(b.size))
    return Axis(".", size)


def squeezed(w: Writer) -> None:
    """Every axis of size one goes, the batch's too if it has one row."""
    value = w.floats()
    if value is None or w.symbolic:
        return
    at = w.random.randint(0, len(value.axes))
    new = [*value.axes[:at], features(1), *value.axes[at:]]
    ones = [n == 1 for n in w.scope[value.name].unsqueeze(at).shape]
    if w.chance(0.5):
        text, left = "squeeze()", [axis for axis, one in zip(new, ones, strict=True) if not one]
    else:
        text, left = f"squeeze({w.choose(at, at - len(new))})", list(value.axes)
    if not any(axis.kind == "B" for axis in left):  # of one row: its positions are all tokens
        left = [Axis("T", axis.size) if axis.kind == "L" else axis for axis in left]
    if left:
        w.add(f"{value.name}.unsqueeze({at}).{text}", left, value)


def expanded(w: Writer) -> None:
    value = w.floats()
    if value is None:
        return
    at, times = w.random.randint(0, len(value.axes)), w.choose(1, 2, 3, w.sizes[0], w.sizes[1])
    new = [*value.axes[:at], features(times), *value.axes[at:]]
    sizes = [w.choose(axis.size, "-1") if n != at else axis.size for n, axis in enumerate(new)]
    text = f"{value.name}.unsqueeze({at}).expand({', '.join(sizes)})"
    if w.chance(0.2):
        repeats = [str(times) if n == at else "1" for n in range(len(new))]
        text = f"{value.name}.unsqueeze({at}).repeat({', '.join(repeats)})"
    w.add(text, new, value)


def repeated(w: Writer) -> None:
    """Heads repeated for grouped queries."""
    value = w.tokens()
    if value is not None:
        size, times = w.size(value, 2), w.choose(2, 3)
        text = w.choose(
            "{0}.repeat_interleave({1}, -1)",
            "{0}.repeat_interleave({1}, dim=2)",
            "{0}.repeat(1, 1, {1})",
            "{0}.tile({1})",
            "{0}.repeat(2, 1, 1, {1})[1]",
            "{0}.unsqueeze(2).tile({1}, 1).flatten(2)",
            "{0}.unsqueeze(2).broadcast_to(-1, -1, {1}, -1).flatten(2)",
            "{0}[..., None].expand(B, L, {2}, {1}).reshape(B, L, -1)",
        )
        w.add(text.format(value.name, times, size), (*value.axes[:2], features(size * times)), value)


def parted(w: Writer) -> None:
    value = w.pick(lambda each: each.axes[-1].kind == "." and each.dtype == "float")
    if value is None or not value.axes[-1].size.isdigit() or (size := w.size(value, -1)) < 2:
        return
    rank, half = len(value.axes), size // 2
    names = [f"{w.name()}a", f"{w.name()}b"]
    rest = features(size - half)
    way = w.choose("chunk", "split", "slice", "unbind", "select", "steps", "tensor_split", "narrow")
    axes = value.axes[:-1]
    if way == "chunk" and size % 2 == 0:
        line, made = f"{value.name}.chunk(2, {w.choose(-1, rank - 1)})", [(*axes, features(half))] * 2
    elif way == "split":
        line, made = f"{value.name}.split([{half}, {size - half}], dim=-1)", [(*axes, features(half)), (*axes, rest)]
    elif way == "tensor_split":
        line, made = f"{value.name}.tensor_split(2, -1)", [(*axes, rest), (*axes, features(half))]
    elif way == "unbind" and size == 2:
        line, made = f"{value.name}.unbind(-1)", [axes, axes]
    elif way == "select":
        line, made = f"{value.name}[..., 0], {value.name}.select(-1, {w.choose(1, -1)})", [axes, axes]
    elif way == "steps":
        line = f"{value.name}[..., ::2], {value.name}[..., 1::2]"
        made = [(*axes, rest), (*axes, features(half))]
    elif way == "narrow":
        line, made = (
            f"{value.name}.narrow(-1, 0, {half}), {value.name}[..., -1:]",
            [(*axes, features(half)), (*axes, features(1))],
        )
    else:
        line, made = f"{value.name}[..., :{half}], {value.name}[..., {half}:]", [(*axes, features(half)), (*axes, rest)]
    if all(made):
        w.write(f"{', '.join(names)} = {line}", dict(zip(names, made, strict=True)), value)


def joined(w: Writer) -> None:
    a = w.floats()
    if a is None:
        return
    same = w.chance(0.7)
    b = w.pick(lambda v: v.dtype == "float" and len(v.axes) == len(a.axes) and (not same or v.axes[:-1] == a.axes[:-1]))
    if b is None:
        return
    if a.axes == b.axes and w.chance(0.5):
        at = w.random.randint(0, len(a.axes))
        w.add(f"torch.stack([{a.name}, {b.name}], {at})", [*a.axes[:at], features(2), *a.axes[at:]], a, b)
    elif a.axes[-1].kind == b.axes[-1].kind == "." and a.axes[-1].size.isdigit() and b.axes[-1].size.isdigit():
        axes = []
        for x, y in zip(a.axes[:-1], b.axes[:-1], strict=True):
            axes.append(x if x.kind == y.kind or y.kind == "." else y if x.kind == "." else Axis(".", x.size))
        last = features(int(a.axes[-1].size) + int(b.axes[-1].size))
        w.add(f"torch.cat([{a.name}, {b.name}], -1)", [*axes, last], a, b)


def written_in_place(w: Writer) -> None:
    """A copy, or a value that others hold views of, is written to."""
    value = w.floats()
    if value is None or not value.axes[-1].size.isdigit():
        return
    name, other = w.name(), w.pick(lambda each: each.axes == value.axes and each.dtype == "float") or value
    template = w.choose(
        *("{n} = {v}.clone()\n{n} += {o}", "{n} = {v} * 2\n{n}[..., 0] = 1.0", "{n} = {v}.clone()\n{n}[..., :1] *= 2"),
        *("{n} = torch.zeros_like({v})\n{n}[..., 1:] = {o}[..., 1:]", "{n} = {v} + 0\n{n}.masked_fill_({o} > 0, 0.5)"),
        *("{n} = {v} + 1\n{n}.transpose(-1, 0).mul_(2)", "{n} = {v}.clone()\n{n}.mul_({o}).add_(1)"),
        *(
            "{n} = torch.empty({v}.shape, dtype=torch.float64)\n{n}.copy_({o})",
            "{n} = {v}.exp().clamp(max=3)\n{n}[..., 0].mul_(3)",
        ),
        *(
            "{n} = {v} * 1\n{n}[0] = 0.0",
            "{n} = {v} * 1\n{n}[..., :] = {o}[..., :1]",
            "{n} = {v} - 1\n{n}.view(-1)[0] = 2.0",
        ),
        *(
            "{n} = F.relu({v} + 0, inplace=True)",
            "{n} = {v}.new_zeros({v}.shape)\n{n}[..., 0] += {o}[..., 0]",
            "{n} = {v} * 3\n{n}.flatten(0, -1).mul_(2)",
            "{n} = {v} * 2\n{n}c = {n}[..., :1]\n{n}.add_(1)\n{n} = {n} * {n}c",
            "{n} = {v} * 2\n{n}c = {n}[..., 0]\n{n}c.mul_(3)\n{n} = {n} + {n}c.unsqueeze(-1)",
            "{n} = {v} + 1\n{n}c = {n}.transpose(-1, 0)\n{n}[..., -1] = 0.5\n{n}c.mul_(2)",
            "{n} = {v} + 1\n{n}c = {n}.detach()\n{n} = {n} * 2\n{n}c.zero_()",
            "{n} = {v} * 2\n{n} += {n}[..., :1].clone()",
        ),
    )
    w.write(template.format(n=name, v=value.name, o=other.name), {name: value.axes}, value, other)


def flattened(w: Writer) -> None:
    value = w.pick(lambda each: are_tokens(each.axes) and [a.kind for a in each.axes[:2]] == ["B", "L"])
    if value is not None:
        rest = value.axes[2:]
        text = w.choose("{0}.view(B * L{1})", "{0}.reshape(-1{1})", "{0}.flatten(0, 1)", "{0}.reshape(B * L{1})")
        w.add(text.format(value.name, "".join(f", {axis.size}" for axis in rest)), (TOKENS, *rest), value)


def unflattened(w: Writer) -> None:
    value = w.pick(lambda each: each.axes[0].kind == "T")
    if value is not None:
        axes = (Axis("B", "B"), Axis("L", "L"), *value.axes[1:])
        sizes = [axis.size for axis in axes]
        text = w.choose(
            f"view({', '.join(sizes)})",
            f"reshape({', '.join(['-1', *sizes[1:]])})",
            "unflatten(0, (B, L))",
            f"view({', '.join(['B', '-1', *sizes[2:]])})",
        )
        w.add(f"{value.name}.{text}", axes, value)
