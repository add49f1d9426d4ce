#!/bin/bash
# Two machines of 8 GPUs: sbatch training_scripts/accelerate/slurm.sh --config lion_sp_8b --output_dir runs/lion-sp-8b
# Output folder, data and model lie where both machines see them. After a preemption or a failed machine Slurm starts the
# job again, and it goes on from its last whole checkpoint; submit it once more when its time was too short.
#SBATCH --job-name=lion-st
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${machines%%$'\n'*} # no pipe into head, whose end would end the job
export OMP_NUM_THREADS=8
# One torchrun a machine; each finds the others at the first one.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:29500" \
    -m lion_st train --fsdp "$@"
