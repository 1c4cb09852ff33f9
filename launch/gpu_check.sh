#!/usr/bin/env bash
# Everything that only a GPU can show, in under ten minutes on one: tests marked gpu, then a real training step with tokens/s, MFU
# and memory. Uses .venv if there is one, else the python on PATH (torch, megatron-core, transformers and pytest must be there).
# The report also goes to runs/gpu_check/report.txt.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ -x "$MEGAMOD_ROOT/.venv/bin/python" ] && export PATH="$MEGAMOD_ROOT/.venv/bin:$PATH"
cd "$MEGAMOD_ROOT"
export PYTHONPATH="$MEGAMOD_ROOT${PYTHONPATH:+:$PYTHONPATH}"
rm -rf runs/gpu_check
mkdir -p runs/gpu_check
{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    git log -1 --format='commit %H' 2>/dev/null || true
    python -c 'import torch, megatron.core; print("torch", torch.__version__, "· megatron-core", megatron.core.__version__)'
    python -m pytest -m gpu tests
    python -m torch.distributed.run --standalone --nproc-per-node 1 -m megamod.train configs/gpu_check.py
} 2>&1 | tee runs/gpu_check/report.txt
