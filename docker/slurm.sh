#!/bin/bash
# 32 GPUs on 4 nodes, one process a node: sbatch docker/slurm.sh
#SBATCH --job-name=linvideo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=7-00:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
# 600 s before the time is up SLURM sends SIGTERM: the step ends, one state is saved, and the same
# command goes on from there when the job is queued again.
srun --kill-on-bad-exit=1 .venv/bin/python train.py \
    --config=configs/wan14b.py --workdir=/shared/wan14b \
    --config.checkpoint=/shared/models/wan14b
