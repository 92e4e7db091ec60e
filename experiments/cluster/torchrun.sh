#!/bin/bash
# One node of eight GPUs. On several, start it on each with --nnodes, --node-rank and --master-addr of the first, and
# give --trainer.num_nodes.
torchrun --nproc-per-node 8 -m sora_lightning fit \
    --config experiments/own_clips/text_to_video_gpu.yaml \
    --config experiments/cluster/fully_sharded.yaml --trainer.devices 8 --trainer.precision bf16-mixed
