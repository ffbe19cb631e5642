#!/bin/bash
# One machine, several GPUs. Submit with: sbatch examples/slurm/one_node.sh
# Written from SLURM's manual; not yet run on a real cluster.
#
# Change: the time limit, --gpus and --cpus-per-task (the processes of the loader run on these cores too), and the four
# values below. The run stops at a checkpoint two minutes before the time limit and is queued again, until it is done.
#SBATCH --job-name=nestseg
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# B: is this script, which passes the signal on; 120 s must suffice for one step and one checkpoint
#SBATCH --signal=B:USR1@120

set -u

DEVICES=4
RECIPE=deeplabv3plus_resnest101-d8_ade20k
DATA=$HOME/data/ade20k
RUN=$HOME/runs/deeplabv3plus_ade20k

# bash runs a trap only between commands, and waits for no command that runs in the background
nestseg train "$RECIPE" --data "$DATA" --run "$RUN" --devices "$DEVICES" --resume --allow-fresh &
training=$!
trap 'kill -USR1 "$training"' USR1
# SLURM sends SIGTERM when the job is cancelled or preempted
trap 'kill -TERM "$training"' TERM

# a signal ends wait, not the training
while kill -0 "$training" 2>/dev/null; do
    wait "$training"
done
wait "$training"
code=$?

# 75: stopped at a checkpoint. Anything else is done, or an error that another start would meet again.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
