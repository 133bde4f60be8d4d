import sys
from pathlib import Path

# Scripts import what lies beside them.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
