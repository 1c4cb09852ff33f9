#!/usr/bin/env bash
# One node: launch/node.sh configs/<run>.py optim.lr=3e-6 …; NPROC ranks, by default one a GPU, or two where there is none.
# After the death of a rank all are started again, MAX_RESTARTS times (0), and go on from the newest checkpoint. LOGS=<folder>: what each
# rank prints is there too. Where there are GPUs the node is looked at first: launch/health.sh; HEALTH=0: it is not.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ -x "$MEGAMOD_ROOT/.venv/bin/python" ] && export PATH="$MEGAMOD_ROOT/.venv/bin:$PATH"
if [ -z "${NPROC:-}" ]; then
    NPROC=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
fi
if [ "${HEALTH:-1}" != 0 ] && [ -n "${CUDA_VISIBLE_DEVICES-all}" ] && command -v nvidia-smi >/dev/null; then
    if ! unfit=$(GPUS=$NPROC bash "$MEGAMOD_ROOT/launch/health.sh" "$(megamod_dir "$@")"); then
        echo "megamod: error: ${unfit//$'\n'/; }; HEALTH=0 goes on all the same" >&2
        exit 1
    fi
fi
trap '' USR1 # it asks the ranks to save and end; torchrun would die of it
exec torchrun --standalone --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-0}" ${LOGS:+--log-dir "$LOGS" --tee 3} \
    -m megamod.train "$@"
