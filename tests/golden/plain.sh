#!/bin/bash
# qwen-coder-32b on vLLM, by biollm VERSION
#SBATCH --job-name=biollm-qwen-coder-32b
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=208
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --open-mode=append
#SBATCH --output=/scratch/lab/biollm/logs/biollm-%j.log
#SBATCH --no-requeue
#SBATCH --exclusive

set -eo pipefail
umask 077
unset VLLM_PORT SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK
source /home/me/envs/vllm/bin/activate
export HF_HUB_OFFLINE=1
export HF_HOME=/scratch/lab/biollm/cache/huggingface
export VLLM_NO_USAGE_STATS=1
export DO_NOT_TRACK=1
export VLLM_CACHE_ROOT=/scratch/lab/biollm/cache/vllm
mkdir -p /scratch/lab/biollm/cache
set -u

# vLLM requires this key on /v1 only. Its other routes are open to everybody who can reach the node.
[ -s /scratch/lab/biollm/my.key ] || { echo "The key file is missing or empty: run biollm render-slurm --plain again." >&2; exit 78; }
# shellcheck disable=SC2155
export VLLM_API_KEY=$(cat /scratch/lab/biollm/my.key)

exec vllm serve /scratch/lab/models/Qwen/Qwen2.5-Coder-32B-Instruct \
    --served-model-name qwen-coder-32b \
    --tensor-parallel-size 1 \
    --max-model-len 32768 \
    --dtype bfloat16 \
    --gpu-memory-utilization 0.95 \
    --enable-auto-tool-choice \
    --tool-call-parser hermes \
    --host 0.0.0.0 \
    --port 8000

# To use this server, add it to providers.yaml, with the node that `squeue --me` shows in place of NODE:
#
# providers:
#   plain-vllm:
#     type: "local"
#     priority: 5
#     models: ["qwen-coder-32b"]
#     key_file: "/scratch/lab/biollm/my.key"
#     base_url: "http://NODE:8000/v1"
