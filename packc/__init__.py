"""packc: stock Mamba, hybrid and linear-attention models on packed sequences, at compile time."""

from packc import config, ddp, distributed, frontends, ops
from packc.compiler import NotPacked, backend
from packc.report import Report, explain

frontends.install()
ddp.install()

__version__ = "0.1.0"
__all__ = ["NotPacked", "Report", "backend", "config", "distributed", "explain", "ops"]
