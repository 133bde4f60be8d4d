"""packc: stock Mamba, hybrid and linear-attention models on packed sequences, at compile time."""

from packc import config, ops

__version__ = "0.1.0"
__all__ = ["config", "ops"]
