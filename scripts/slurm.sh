#!/bin/bash
# Pre-train on a Slurm cluster; a run that its time limit cuts off is saved, put back in the queue and goes on.
#
#     sbatch scripts/slurm.sh
#     sbatch --nodes 4 scripts/slurm.sh
#
# Submit it from the checkout, with the environment active that `pip install` went into. Edit one line, TRAIN. GPUs a
# node and tasks a node are the same number: there is one rank for each GPU.
#SBATCH --job-name=dira
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

TRAIN=${TRAIN:-"train.py shards --mode dir --run-dir runs/dir"}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE TRAIN
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun no longer takes it from sbatch

# Five minutes before the limit Slurm sends USR1 to every rank; they save at the same step and end with status 75.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python $TRAIN'
status=$?

[ $status -eq 75 ] && exec scontrol requeue "$SLURM_JOB_ID"
exit $status
