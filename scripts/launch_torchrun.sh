#!/usr/bin/env bash
# Train a recipe on this node's GPUs, or on several nodes (run it on each of them):
#   scripts/launch_torchrun.sh [--dry-run] RECIPE.yaml [ARGUMENTS OF dvpa train]
#     NODES=1          nodes in all
#     RANKS=8          ranks on each (default: one per GPU, 1 without any)
#     ENDPOINT=h:29400 where the nodes meet: the first node's name (default: 127.0.0.1:29400)
#     ADDRESS=h        this node's own name or number, as the others reach it; the first node's is
#                      ENDPOINT's (default: what the host calls itself)
#     JOB=dvpa         the same on every node, another for every run
#     RESTARTS=3       attempts after a rank has died; each resumes from the last checkpoint
#     OUTAGE=1800      seconds that a node may be gone; after that the others end, too
#     HOURS=0          end the run after so many hours (0: never); TERM first, KILL after two minutes
#     TRAIN="..."      what every rank runs (default: -m dvpa train)
# Several interfaces: GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME on GPUs, name the one to use.
# c10d rendezvous, also on one node: a static one can hang after a rank was killed. Every start gets a
# store of its own: from the one that torchrun shares by default, a node that comes back is shut out.
set -euo pipefail

dry_run=0
if [ "${1:-}" = "--dry-run" ]; then dry_run=1; shift; fi
if [ $# -lt 1 ]; then sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2; fi

count_gpus() {
    local count
    count=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || count=0
    if [ "$count" -gt 0 ]; then echo "$count"; else echo 1; fi
}

for name in NODES RANKS RESTARTS OUTAGE HOURS; do
    value=${!name:-0}
    case "$value" in
        *[!0-9]*) echo "launch_torchrun: $name=$value must be a whole number" >&2; exit 2 ;;
    esac
done
read -r -a train <<< "${TRAIN:--m dvpa train}"
endpoint=${ENDPOINT:-127.0.0.1:29400}
# Both ends of OUTAGE: how long a launcher asks the first node's store, and waits for the other nodes.
settings="read_timeout=${OUTAGE:-1800},join_timeout=${OUTAGE:-1800}"
rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${JOB:-dvpa}")
if [ -n "${ADDRESS:-}" ]; then
    rendezvous+=(--local-addr "$ADDRESS")
    if [ "$ADDRESS" = "${endpoint%:*}" ]; then settings+=,is_host=1; else settings+=,is_host=0; fi
fi
command=(
    env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    "${PYTHON:-python3}" -m torch.distributed.run
    --nnodes "${NODES:-1}" --nproc-per-node "${RANKS:-$(count_gpus)}"
    "${rendezvous[@]}" --rdzv-conf "$settings" --max-restarts "${RESTARTS:-3}"
    "${train[@]}" "$@"
)
hours=${HOURS:-0}
if [ "$hours" -gt 0 ]; then command=(timeout --kill-after=120 "${hours}h" "${command[@]}"); fi
if [ "$dry_run" = 1 ]; then printf '%q ' "${command[@]}"; echo; exit 0; fi
exec "${command[@]}"
