#!/bin/bash
# Four nodes of eight GPUs. Submit it from the folder that holds experiments/, runs/ and the clips:
#   sbatch experiments/cluster/slurm.sh
# Lightning reads ranks and addresses from SLURM's variables: one task a GPU.
#SBATCH --job-name=text_to_video
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGTERM@120
#SBATCH --requeue

run_dir=runs/own_clips/text_to_video_gpu
resume=""
if [ -e "$run_dir/checkpoints/last.ckpt" ]; then resume="--ckpt_path last"; fi
# SIGTERM reaches the tasks two minutes before the time is over, and ends them after the step.
srun --kill-on-bad-exit=1 \
    sora-lightning fit --config experiments/own_clips/text_to_video_gpu.yaml \
    --config experiments/cluster/fully_sharded.yaml --run_dir "$run_dir" \
    --trainer.num_nodes 4 --trainer.devices 8 --trainer.precision bf16-mixed $resume
