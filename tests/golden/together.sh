#!/bin/bash
# qwen-coder-32b, llama-3.3-70b, minimax-m2, codellama-34b on vLLM, by biollm VERSION
#SBATCH --job-name=biollm-qwen-coder-32b+llama-3.3-70b+minimax-m2+codellama-34b
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=208
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
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

exec python3 /scratch/lab/biollm/biollm/lib/biollm_supervisor_HASH.py "$@" \
  --cluster a3-highgpu-8g --log-dir /scratch/lab/biollm/logs --walltime 28800 --drain 120 --idle-timeout 1800 \
  --model qwen-coder-32b --gpus 1 --start-timeout 1200 -- \
  vllm serve /scratch/lab/models/Qwen/Qwen2.5-Coder-32B-Instruct \
    --served-model-name qwen-coder-32b \
    --tensor-parallel-size 1 \
    --max-model-len 32768 \
    --dtype bfloat16 \
    --gpu-memory-utilization 0.95 \
    --enable-auto-tool-choice \
    --tool-call-parser hermes \
  --and --model llama-3.3-70b --gpus 2 --start-timeout 1800 -- \
  vllm serve /scratch/lab/models/meta-llama/Llama-3.3-70B-Instruct \
    --served-model-name llama-3.3-70b \
    --tensor-parallel-size 2 \
    --max-model-len 32768 \
    --gpu-memory-utilization 0.95 \
    --dtype bfloat16 \
    --enable-auto-tool-choice \
    --tool-call-parser llama3_json \
  --and --model minimax-m2 --gpus 4 --start-timeout 2400 -- \
  vllm serve /scratch/lab/models/MiniMaxAI/MiniMax-M2 \
    --served-model-name minimax-m2 \
    --tensor-parallel-size 4 \
    --max-model-len 196608 \
    --trust-remote-code \
    --enable-expert-parallel \
    --enable-auto-tool-choice \
    --tool-call-parser minimax_m2 \
    --reasoning-parser minimax_m2 \
  --and --model codellama-34b --gpus 1 --start-timeout 1200 -- \
  vllm serve /scratch/lab/models/codellama/CodeLlama-34b-Instruct-hf \
    --served-model-name codellama-34b \
    --tensor-parallel-size 1 \
    --max-model-len 16384 \
    --dtype bfloat16
