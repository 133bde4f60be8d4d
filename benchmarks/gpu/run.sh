#!/usr/bin/env bash
# Everything about a GPU that fits into a few minutes: benchmarks/gpu/run.sh [--dry] OUT [SECONDS]; see README.md.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/drive.py" "$@"
