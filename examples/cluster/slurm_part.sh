#!/bin/bash
#SBATCH --job-name=lox --array=1-4 --cpus-per-task=16 --mem=32G --requeue
srun lox-stream run --base /models/base --aligned /models/aligned --out /models/lox \
  --part "$SLURM_ARRAY_TASK_ID/4" --resume
