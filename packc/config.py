"""packc's options: a leaf module that every other part may import.

Set them on the module (``packc.config.strict = True``), for a block (``with packc.config.patch(strict=True):``), per
compiled model (``torch.compile(m, backend="packc", options={"packc.strict": True})``) or in the environment
(``PACKC_STRICT=1``).
"""

import sys
from typing import TYPE_CHECKING

from packc.private_torch import private_torch

# Private in torch, public in practice: every torch subsystem keeps its options this way.
with private_torch():
    from torch.utils._config_module import Config, install_config_module

if TYPE_CHECKING:
    from torch.utils._config_typing import *  # noqa: F403  what install_config_module adds: patch, get_config_copy, ...

strict: bool = Config(default=False, env_name_default="PACKC_STRICT")
"""Every fallback raises with its reason: a graph that cannot be packed when it is compiled, a batch when it is run."""

kernels: str = Config(default="auto", env_name_default="PACKC_KERNELS")
"""Which implementation the ops run: "auto", "reference" (plain torch), "cpu" (C++) or "triton"."""

mask: str | None = Config(default=None, env_name_default="PACKC_MASK")
"""Name of the model's padding-mask argument, or of several, one a sequence, with commas between them or as a list; None
looks for them by name and use."""

loss_outside: bool | None = Config(default=None, env_name_default="PACKC_LOSS_OUTSIDE")
"""Labels count outside of the compiled graph, on returned logits, that of a left-padded row's first token among them:
where a graph has no labels, such a row begins one position earlier, where stock predicts it. False: none does, whoever
goes on with what is returned. None: as if True in a graph that ends in a graph break and in a block of a trained model;
elsewhere False, with a warning."""

lazy_logits: bool = Config(default=True, env_name_default="PACKC_LAZY_LOGITS")
"""Where gradients are taken, logits that a model returns beside its loss are computed when they are first read; whoever
reads them after the model's weights have changed gets an error. False: always, as stock does."""

inner: str = Config(default="inductor", env_name_default="PACKC_INNER")
"""The backend that compiles the packed graph: "inductor", or "aot_eager" to debug without code generation."""

skip_passes: str | None = Config(default=None, env_name_default="PACKC_SKIP_PASSES")
"""Names of passes to leave out, to debug, with commas between them or as a list (packc/pipeline.py)."""

check_plans: bool = Config(default=False, env_name_default="PACKC_CHECK_PLANS")
"""To debug sequence parallelism: plans, and before each op what it is called with, are compared between ranks; what
differs raises on all of them, where it would hang or be wrong."""

install_config_module(sys.modules[__name__])
