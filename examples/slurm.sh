#!/bin/bash
# Train on several machines under Slurm, as long as it takes: sbatch examples/slurm.sh CONFIG [FLAGS]
#
#SBATCH --job-name=elit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=elit-%j.log
# Ten minutes before the time is over, all processes get SIGTERM: they save and leave with 130.
#SBATCH --signal=TERM@600

set -u
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

# Slurm starts a process for each GPU, so that its signals reach them; torchrun is not needed.
# If one of them ends, the others follow within a minute.
srun --kill-on-bad-exit=0 --wait=600 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec elit train "$@"
' elit "${@:-imagenet-256/elit-dit-mb}"
code=$?

if [ "$code" -eq 130 ]; then # stopped and saved: the same command goes on
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
