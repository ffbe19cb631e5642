#!/bin/bash
# Several machines with several GPUs each. Submit with: sbatch examples/slurm/several_nodes.sh
# Written from the manuals of SLURM and torchrun; not yet run on a real cluster.
#
# Change: --nodes, --gpus-per-node, --cpus-per-task, the time limit, and the values below. Every machine must see DATA and
# RUN under the same path. The run stops at a checkpoint two minutes before the time limit and is queued again.
#SBATCH --job-name=nestseg
#SBATCH --nodes=2
# one torchrun a machine, which starts a process a GPU
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

set -u

DEVICES=4
RECIPE=deeplabv3plus_resnest101-d8_ade20k
DATA=$HOME/data/ade20k
RUN=$HOME/runs/deeplabv3plus_ade20k
# any free port of the first machine; two jobs on one machine need two
PORT=29400

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# ranks that start again after a kill do not read addresses of the old ones
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun kills ranks so long after it passed a signal on; less than the 120 s above
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100
# a slow shared file system makes some ranks start late
export NESTSEG_JOIN_TIMEOUT=300
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / DEVICES))

# torchrun does not know SIGUSR1 unless told; "--" keeps it from reading --run as an option of its own
srun torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$DEVICES" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$PORT" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
    -m nestseg -- train "$RECIPE" --data "$DATA" --run "$RUN" --resume --allow-fresh &
training=$!

# torchrun ends with 1 whatever ended its ranks, so that this script has to remember that it asked them to stop
stopped=0
trap 'stopped=1; kill -USR1 "$training"' USR1
trap 'kill -TERM "$training"' TERM

# a signal ends wait, not the training
while kill -0 "$training" 2>/dev/null; do
    wait "$training"
done
wait "$training"
code=$?

if [ "$stopped" -eq 1 ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
fi
exit "$code"
