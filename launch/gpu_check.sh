#!/usr/bin/env bash
# Everything that only a GPU can show, on one of them: kernels against their references and their speed, tests marked
# gpu, a real training step with tokens/s, MFU and memory, and the main job. Uses .venv if there is one, else the python on PATH, with
# what setup.py names and pytest. All parts run, whatever the first says; the exit status is the last bad one. The report also goes to
# runs/gpu_check/report.txt.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ -x "$MEGAMOD_ROOT/.venv/bin/python" ] && export PATH="$MEGAMOD_ROOT/.venv/bin:$PATH"
cd "$MEGAMOD_ROOT" || exit 1
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "megamod: error: no GPU that torch can use" >&2
    exit 1
fi
rm -rf runs/gpu_check runs/gpu_check_lora
mkdir -p runs/gpu_check
check() {
    local status=0
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
    git log -1 --format='commit %H' 2>/dev/null || true
    python -c 'import torch, megatron.core; print("torch", torch.__version__, "· megatron-core", megatron.core.__version__)'
    python -m pytest -m gpu tests/test_kernel_*.py tests/test_gpu.py || status=$?
    python kernels/bench.py packing || status=$?
    python kernels/bench.py lora || status=$?
    python kernels/bench.py nf4 || status=$?
    python kernels/bench.py rmsnorm || status=$?
    python kernels/bench.py swiglu || status=$?
    python tools/bench_context.py --shape configs/models/smollm2-135m --cp 1 || status=$?
    python -m torch.distributed.run --standalone --nproc-per-node 1 -m megamod.train configs/gpu_check.py || status=$?
    python -m torch.distributed.run --standalone --nproc-per-node 1 -m megamod.train configs/gpu_check_lora.py || status=$?
    python -c 'import json, sys
run = json.load(open("runs/gpu_check_lora/run.json"))
paths = {**run["adapters"], "norms and SwiGLU": run["backends"]["fusion"]}
slow = [name for name, path in paths.items() if path != "triton"]
sys.exit(f"megamod: error: not by the fused kernel: {slow}" if slow or not run["adapters"] else 0)' || status=$?
    # The 72B shape in 4 bits on one GPU; then a run with a base in 4 bits.
    python tools/bench_qlora.py --shape configs/models/qwen2.5-72b --tokens 8192 || status=$?
    python -m torch.distributed.run --standalone --nproc-per-node 1 -m megamod.train configs/tiny.py model.dtype=bfloat16 steps=4 lora.r=8 \
        model.quantization.quant_type=nf4 dir=runs/gpu_check/qlora || status=$?
    # A second model that follows, and an adapter's own passes: their devices and dtypes.
    local dpo=(python -m torch.distributed.run --standalone --nproc-per-node 1 -m megamod.train configs/tiny_dpo.py model.dtype=bfloat16 steps=4)
    "${dpo[@]}" dir=runs/gpu_check/dpo reference.sync_every=2 reference.sync_alpha=0.5 || status=$?
    "${dpo[@]}" dir=runs/gpu_check/dpo_lora lora.r=8 checkpoint.export=false || status=$?
    MEGAMOD_NO_INSTALL=1 NPROC=1 bash launch/quickstart.sh || status=$?
    return "$status"
}
check 2>&1 | tee runs/gpu_check/report.txt
