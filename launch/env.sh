# Sourced by every launcher: the virtual environment, and the variables that a run needs, each with its reason.

# The folder `kernels/` and the package `kernels` that transformers looks for must not meet on sys.path.
export PYTHONSAFEPATH=1
# torchrun restarts are flaky while agent and workers share a store: of 6 runs with a killed rank 3 recovered; without, 6 of 6.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# After SIGTERM to torchrun: seconds for the step at hand and its save before the ranks are killed (30 otherwise).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# Where what ranks print is kept for each of them (LOGS), the console says whose line it is; torchrun's own prefix has local ranks.
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:-'[${rank}] '}
# NCCL says why a communicator could not be made or has failed; INFO says so much that nobody finds it.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A link that goes down for some seconds must not end a hundred ranks: InfiniBand waits 4 µs × 2^22 for an answer, and asks seven times.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# Which adapters and which interface are meant is for the site to say, in NCCL_IB_HCA (launch/health.sh looks at these) and
# NCCL_SOCKET_IFNAME; both reach the ranks. Saves are agreed upon through gloo, which asks the node's name and so may take another network.
if [ -e "/sys/class/net/${NCCL_SOCKET_IFNAME:-none}" ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}
fi
# Tensor parallelism overlaps communication with computation only if kernels start in the order they are issued.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# cuBLAS is deterministic only with a fixed workspace; needed by deterministic=true, harmless otherwise.
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
# Long runs with changing sizes: less fragmentation.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# One thread a rank unless told otherwise; torchrun would say so in a box of asterisks.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# No model hub, and no telemetry.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

# The repository's root, wherever the caller is; importable without an installation too.
MEGAMOD_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$MEGAMOD_ROOT:$MEGAMOD_ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"

# Below which folder a run of these arguments writes, where they say it: for launch/health.sh.
megamod_dir() {
    local argument folder=.
    for argument in "$@"; do
        case $argument in dir=*) folder=${argument#dir=} ;; esac
    done
    echo "$folder"
}

# Make or reuse .venv with megamod and the extras given ("", "gguf", "test", "cuda"); then use it. MEGAMOD_NO_INSTALL=1: use what is
# on PATH as it is.
megamod_venv() {
    [ -n "${MEGAMOD_NO_INSTALL:-}" ] && return
    local extras=${1:+[$1]} python stamp
    stamp="$MEGAMOD_ROOT/.venv/.megamod-${1:-core}"
    if [ ! -x "$MEGAMOD_ROOT/.venv/bin/python" ]; then
        for python in python3.13 python3.12 python3.11 python3.10 python3; do
            command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
            python=
        done
        if [ -z "$python" ]; then
            echo "megamod: error: no Python >= 3.10 on PATH" >&2
            return 1
        fi
        if ! "$python" -m venv "$MEGAMOD_ROOT/.venv"; then
            rm -rf "$MEGAMOD_ROOT/.venv" # half-made (Debian without python3-venv), it would be taken for whole next time
            return 1
        fi
    fi
    # Installed again only when setup.py has changed.
    if [ ! -f "$stamp" ] || [ "$MEGAMOD_ROOT/setup.py" -nt "$stamp" ]; then
        "$MEGAMOD_ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$MEGAMOD_ROOT$extras" || return 1
        touch "$stamp"
    fi
    export PATH="$MEGAMOD_ROOT/.venv/bin:$PATH"
}
