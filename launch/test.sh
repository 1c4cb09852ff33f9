#!/usr/bin/env bash
# All checks and tests, on a fresh machine with Python >= 3.10 and no GPU. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
megamod_venv test
export CUDA_VISIBLE_DEVICES= # these tests are for the CPU, also where there is a GPU; launch/gpu_check.sh has the others
cd "$MEGAMOD_ROOT"
ruff check .
ruff format --check .
mypy
python -m pytest -m "not gpu" "$@"
