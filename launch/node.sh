#!/usr/bin/env bash
# One node: launch/node.sh configs/<run>.py optim.lr=3e-6 …; NPROC ranks, by default one a GPU, or two where there is none.
# After the death of a rank all are started again, MAX_RESTARTS times (0), and go on from the newest checkpoint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ -x "$MEGAMOD_ROOT/.venv/bin/python" ] && export PATH="$MEGAMOD_ROOT/.venv/bin:$PATH"
if [ -z "${NPROC:-}" ]; then
    NPROC=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
fi
trap '' USR1 # it asks the ranks to save and end; torchrun would die of it
exec torchrun --standalone --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-0}" -m megamod.train "$@"
