"""A function of rows, on rows that are tokens."""

from __future__ import annotations

from packc.passes.axes import OTHER, TOKENS, covers_tokens, show, value_of
from packc.passes.reading import NotTokenwise, Reading
from packc.passes.rules.registry import Op


def row_wise(op: Op) -> Reading:
    """Rows (tokens, ...) -> (tokens, ...); everything else is the same for all of them."""
    count = op.target.rows  # type: ignore[attr-defined]
    rows, others = op.args[:count], op.args[count:]
    for each in rows:
        layout = op.layout(each)
        if layout is None or layout[0] is not TOKENS:
            raise NotTokenwise(f"works on rows {show(layout)}, which are not tokens")
    for each in others:
        if covers_tokens(op.layout(each)):
            raise NotTokenwise(f"operand {each.name} {show(op.layout(each))} varies from token to token")
    needs = {each: (TOKENS,) + (OTHER,) * (value_of(each).ndim - 1) for each in rows}
    return Reading((TOKENS,) + (OTHER,) * (value_of(op.node).ndim - 1), needs)
