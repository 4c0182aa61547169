#!/bin/bash
# big on vLLM, by biollm VERSION
#SBATCH --job-name=biollm-big
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=208
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
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

exec srun --kill-on-bad-exit=1 --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=208 --cpu-bind=none \
  python3 /scratch/lab/biollm/biollm/lib/biollm_supervisor_HASH.py "$@" \
  --cluster a3-highgpu-8g --log-dir /scratch/lab/biollm/logs --walltime 28800 --drain 120 --idle-timeout 1800 --nodes 2 \
  --model big --gpus 8 --start-timeout 3600 -- \
  vllm serve /scratch/lab/models/deepseek-ai/DeepSeek-Coder-V2-Instruct \
    --served-model-name big \
    --nnodes 2 \
    --distributed-executor-backend mp \
    --tensor-parallel-size 8 \
    --pipeline-parallel-size 2
