#!/usr/bin/env bash
#SBATCH --job-name=dvpa
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Train a recipe on a SLURM cluster, and be put back into the queue when the time is up:
#   sbatch [--nodes N] scripts/launch_slurm.sh RECIPE.yaml [ARGUMENTS OF dvpa train]
# Two minutes before the limit SLURM sends USR1 to this script, which passes it on to every trainer (they
# save) and requeues the job; the next start resumes from the last checkpoint. Cancelling does not requeue.
#
# Gloo and NCCL, to be set for your cluster before sbatch if the default is wrong:
#   GLOO_SOCKET_IFNAME=eth0     the interface of checkpoints and small messages, where there are several
#   NCCL_SOCKET_IFNAME=eth0     the same for NCCL's rendezvous
#   NCCL_IB_HCA=mlx5            the adapters to use
#   NCCL_DEBUG=WARN             INFO to see which ones it chose
set -uo pipefail
if [ $# -lt 1 ]; then echo "usage: sbatch scripts/launch_slurm.sh RECIPE.yaml [...]" >&2; exit 2; fi

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A collective that waits for a dead rank ends with an error instead of for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# The first by name, as torchrun orders them: its rank 0 works on alone at the end, and the launcher that
# keeps the store must not leave before it.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | LC_ALL=C sort | head -n 1)
export NODES=$SLURM_JOB_NUM_NODES RANKS=${RANKS:-${SLURM_GPUS_ON_NODE:-8}}
export ENDPOINT="$head:${PORT:-29400}" JOB="dvpa-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
here=${DVPA_HOME:-$SLURM_SUBMIT_DIR}

requeue=0
save_and_requeue() {
    requeue=1
    # torchrun does not pass USR1 on, and would die of it: the trainers are told themselves, on every
    # node (the pattern is anchored, so that torchrun's own command line does not fit).
    srun --overlap --ntasks-per-node=1 pkill -USR1 -u "$USER" -f '^[^ ]*python[^ ]* (-u )?-m dvpa train' || true
}
trap save_and_requeue USR1

# Single quotes: every node says its own name.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'ADDRESS=$SLURMD_NODENAME exec bash "$@"' launch \
    "$here/scripts/launch_torchrun.sh" "$@" &
trainer=$!
wait "$trainer"
status=$?
# A signal ends `wait`, not the trainer: let it finish saving.
while kill -0 "$trainer" 2>/dev/null; do
    wait "$trainer"
    status=$?
done
if [ "$requeue" = 1 ]; then scontrol requeue "$SLURM_JOB_ID"; exit 0; fi
exit "$status"
