"""Forms of one graph: how the values of tokens lie in memory, and who computes them."""

from packc.passes.forms.form import Form
from packc.passes.forms.packed import Packed
from packc.passes.forms.padded import Padded
from packc.passes.forms.sharded import Sharded

__all__ = ["Form", "Packed", "Padded", "Sharded"]
