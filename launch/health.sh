#!/usr/bin/env bash
# Whether this node can take part in a run that writes below a folder: launch/health.sh <folder>. What is wrong is said in lines
# "<node>: …", with exit status 1; of a node that is fit nothing is said.
#   GPUS          how many it must have; without, nothing is asked of GPUs
#   NOW           seconds since the epoch, on the node that asks; MAX_SKEW (120) more or less are none
#   MIN_DISK_GIB  (20) must be free where the run writes; a checkpoint of 72B weights, masters and moments, takes 800
#   MAX_GPU_MIB   (2048) of a GPU may be in use before: more is somebody else's process, or one that did not end
#   MIN_MEMORY    (50) percent of the node's memory must be available: less is what earlier jobs have left in /dev/shm, or somebody's
#   SYS, PROC     (/sys, /proc) where the kernel says which InfiniBand ports are up, and how much memory is available
set -uo pipefail
node=${SLURMD_NODENAME:-$(hostname -s)}
status=0
wrong() {
    echo "$node: $*"
    status=1
}

if [ "${GPUS:-0}" -gt 0 ]; then
    which=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))}
    asked=(timeout 60 nvidia-smi "--id=$which" --format=csv,noheader,nounits)
    if ! said=$("${asked[@]}" --query-gpu=index,memory.used,ecc.errors.uncorrected.volatile.total 2>&1); then
        wrong "nvidia-smi: $(tail -n 1 <<<"$said")" # one that has fallen off the bus, or a driver that does not answer
    else
        count=$(grep -c . <<<"$said")
        [ "$count" -ge "$GPUS" ] || wrong "$count of $GPUS GPUs"
        while IFS=', ' read -r gpu used errors; do
            [[ $used =~ ^[0-9]+$ && $used -gt ${MAX_GPU_MIB:-2048} ]] && wrong "GPU $gpu: $used MiB are in use before the run"
            [[ $errors =~ ^[1-9] ]] && wrong "GPU $gpu: $errors uncorrected ECC errors since its driver was loaded"
        done <<<"$said"
        # Rows of memory that wait for a reset to be replaced, or could not be; older GPUs have no such thing.
        rows=$("${asked[@]}" --query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure 2>/dev/null) || rows=
        while IFS=', ' read -r gpu pending failure; do
            [[ $pending =~ ^(1|Yes) ]] && wrong "GPU $gpu: a row of its memory waits to be remapped: it needs a reset"
            [[ $failure =~ ^(1|Yes) ]] && wrong "GPU $gpu: a row of its memory could not be remapped"
        done <<<"$rows"
    fi
    memory=$(awk '/^MemTotal:/ { all = $2 } /^MemAvailable:/ { print int(100 * $2 / all) }' "${PROC:-/proc}/meminfo")
    [ "${memory:-0}" -ge "${MIN_MEMORY:-50}" ] || wrong "${memory:-0} % of its memory are available, ${MIN_MEMORY:-50} were expected"
    # Those of NVIDIA's Xid errors after which a GPU is of no use until it is reset: double-bit ECC, remapping, NVLink, lost, GSP. The
    # kernel's log may be closed to users; then it is not asked.
    kernel=$(journalctl --dmesg --quiet --no-pager --since=-24h 2>/dev/null) || kernel=$(dmesg 2>/dev/null) || kernel=
    xid=$(grep -Eo 'Xid \(PCI:[^)]*\): (48|64|74|79|95|119|120),' <<<"$kernel" | tail -n 1)
    [ -z "$xid" ] || wrong "the kernel's log has ${xid%,}"
fi

folder=${1:-.}
while [ ! -e "$folder" ]; do folder=$(dirname "$folder"); done
[ -w "$folder" ] || wrong "$folder cannot be written to"
free=$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1048576) }')
[ "${free:-0}" -ge "${MIN_DISK_GIB:-20}" ] || wrong "$folder: ${free:-0} GiB are free, ${MIN_DISK_GIB:-20} were expected"

if [ -n "${NOW:-}" ]; then
    skew=$(($(date +%s) - NOW))
    [ "${skew#-}" -le "${MAX_SKEW:-120}" ] || wrong "its clock is off by $skew s: the run is told to end by it"
fi

# Whether NCCL uses an adapter: NCCL_IB_HCA is a list of prefixes, after = of names, after ^ of those that are not used.
used_by_nccl() {
    local list=${NCCL_IB_HCA:-} others=1 exact= entry
    [ -n "$list" ] || return 0
    [[ $list == ^* ]] && others=0 list=${list#^}
    [[ $list == =* ]] && exact=1 list=${list#=}
    for entry in ${list//,/ }; do
        entry=${entry%%:*}
        [[ $1 == "$entry" || (-z $exact && $1 == "$entry"*) ]] && return $((1 - others))
    done
    return "$others"
}
for adapter in "${SYS:-/sys}"/class/infiniband/*; do
    name=$(basename "$adapter")
    if [ -e "$adapter" ] && used_by_nccl "$name" && ! grep -qs ACTIVE "$adapter"/ports/*/state; then
        wrong "$name: none of its ports is active: $(cat "$adapter"/ports/*/state 2>/dev/null | paste -sd' '); NCCL_IB_HCA says which are meant"
    fi
done
exit "$status"
