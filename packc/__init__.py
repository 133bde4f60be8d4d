"""packc: stock Mamba, hybrid and linear-attention models on packed sequences, at compile time."""

from packc import config, data, ddp, distributed, frontends, ops
from packc.boundaries import documents
from packc.compiler import NotPacked, backend
from packc.report import Report, explain
from packc.totals import stats

frontends.install()
ddp.install()

__version__ = "0.1.0"
__all__ = ["NotPacked", "Report", "backend", "config", "data", "distributed", "documents", "explain", "ops", "stats"]
