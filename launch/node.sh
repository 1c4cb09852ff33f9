#!/usr/bin/env bash
# One node: launch/node.sh configs/<run>.py optim.lr=3e-6 …; NPROC ranks, by default one a GPU, or two where there is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ -x "$MEGAMOD_ROOT/.venv/bin/python" ] && export PATH="$MEGAMOD_ROOT/.venv/bin:$PATH"
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
[ "$gpus" -gt 0 ] || gpus=2
exec torchrun --standalone --nproc-per-node "${NPROC:-$gpus}" -m megamod.train "$@"
