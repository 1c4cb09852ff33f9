#!/usr/bin/env bash
# From nothing to a trained and exported model on a laptop: installs, trains configs/tiny.py on two CPU ranks, exports a Hugging
# Face directory and compares it with transformers. Arguments are overrides: bash launch/quickstart.sh steps=100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
megamod_venv
cd "$MEGAMOD_ROOT"
rm -rf runs/tiny
export CUDA_VISIBLE_DEVICES= NPROC=2
bash launch/node.sh configs/tiny.py parallel.tp=2 "$@"
python tools/compare_hf.py runs/tiny/hf/step-*
