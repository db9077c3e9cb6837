#!/usr/bin/env bash
# Train a recipe on this node's GPUs, or on several nodes (run it on each of them):
#   scripts/launch_torchrun.sh [--dry-run] RECIPE.yaml [ARGUMENTS OF dvpa train]
#     NODES=1          nodes in all
#     RANKS=8          ranks on each (default: one per GPU, 1 without any)
#     ENDPOINT=h:29400 where the nodes meet: the first node's name (default: 127.0.0.1:29400)
#     JOB=dvpa         the same on every node, another for every run
#     RESTARTS=3       attempts after a rank has died; each resumes from the last checkpoint
#     HOURS=0          end the run after so many hours (0: never); TERM first, KILL after two minutes
#     TRAIN="..."      what every rank runs (default: -m dvpa train)
# c10d rendezvous, also on one node: a static one can hang after a rank was killed.
set -euo pipefail

dry_run=0
if [ "${1:-}" = "--dry-run" ]; then dry_run=1; shift; fi
if [ $# -lt 1 ]; then sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; fi

count_gpus() {
    local count
    count=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || count=0
    if [ "$count" -gt 0 ]; then echo "$count"; else echo 1; fi
}

for name in NODES RANKS RESTARTS HOURS; do
    value=${!name:-0}
    case "$value" in
        *[!0-9]*) echo "launch_torchrun: $name=$value must be a whole number" >&2; exit 2 ;;
    esac
done
read -r -a train <<< "${TRAIN:--m dvpa train}"
command=(
    "${PYTHON:-python3}" -m torch.distributed.run
    --nnodes "${NODES:-1}" --nproc-per-node "${RANKS:-$(count_gpus)}"
    --rdzv-backend c10d --rdzv-endpoint "${ENDPOINT:-127.0.0.1:29400}" --rdzv-id "${JOB:-dvpa}"
    --max-restarts "${RESTARTS:-3}"
    "${train[@]}" "$@"
)
hours=${HOURS:-0}
if [ "$hours" -gt 0 ]; then command=(timeout --kill-after=120 "${hours}h" "${command[@]}"); fi
if [ "$dry_run" = 1 ]; then printf '%q ' "${command[@]}"; echo; exit 0; fi
exec "${command[@]}"
