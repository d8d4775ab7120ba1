#!/bin/bash
# What `bigtrain launch --target slurm` submits, by hand: sbatch slurm/batch.sh configs/gpt.yaml [key=value …]
# Change the lines below; every option of sbatch(1) may stand here.
#SBATCH --job-name=bigtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --open-mode=append
#SBATCH --output=bigtrain-%j.log
# #SBATCH --partition=gpu
# #SBATCH --gpus-per-node=8
# #SBATCH --cpus-per-task=8

# Lines that prepare the environment: module load …, source …/activate
# The command below runs on the first node and starts the ranks in this allocation, --nproc of them on each node; it
# starts them again when one dies, and gives the job back to the queue when its time is over.
exec bigtrain launch "$@" launch.target=slurm --in-allocation --nodes "$SLURM_NNODES" --nproc "$SLURM_NTASKS_PER_NODE"
