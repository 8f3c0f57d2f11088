#!/bin/bash
# bash slurm.sh: four tasks that may run at once, and one that puts their parts together when all have finished
set -euo pipefail
job=$(sbatch --parsable slurm_part.sh)
sbatch --dependency="afterok:$job" --wrap "lox-stream finish /models/lox"
