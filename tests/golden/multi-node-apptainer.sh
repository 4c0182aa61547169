#!/bin/bash
# deepseek-coder-v2 on vLLM, by biollm VERSION
#SBATCH --job-name=biollm-deepseek-coder-v2
#SBATCH --partition=gpu-a100
#SBATCH --account=genomics
#SBATCH --qos=long
#SBATCH --constraint=a100&nvlink
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:a100:4
#SBATCH --cpus-per-task=64
#SBATCH --mem=512G
#SBATCH --time=1-02:00:00
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=/scratch/lab/biollm/logs/biollm-%j.log
#SBATCH --no-requeue
#SBATCH --mail-type=END
#SBATCH --comment="for the lab"

set -eo pipefail
umask 077
unset VLLM_PORT SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK
export HF_HUB_OFFLINE=1
export HF_HOME=/scratch/lab/biollm/cache/huggingface
export VLLM_NO_USAGE_STATS=1
export DO_NOT_TRACK=1
export VLLM_CACHE_ROOT=/scratch/lab/biollm/cache/vllm
export NCCL_DEBUG=WARN
mkdir -p /scratch/lab/biollm/cache
set -u

exec srun --kill-on-bad-exit=1 --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=64 --cpu-bind=none \
  apptainer exec --nv --bind=/scratch/lab/biollm --bind=/scratch/lab/biollm/logs --bind=/scratch/lab/biollm/cache --bind=/scratch/lab/models --bind=/data:/data:ro /images/vllm.sif \
  python3 /scratch/lab/biollm/biollm/lib/biollm_supervisor_HASH.py "$@" \
  --cluster university --log-dir /scratch/lab/biollm/logs --walltime 93600 --drain 120 --idle-timeout 1800 --nodes 2 \
  --model deepseek-coder-v2 --gpus 4 --start-timeout 3600 -- \
  vllm serve /scratch/lab/models/deepseek-ai/DeepSeek-Coder-V2-Instruct \
    --served-model-name deepseek-coder-v2 \
    --nnodes 2 \
    --distributed-executor-backend mp \
    --tensor-parallel-size 8 \
    --max-model-len 131072 \
    --dtype bfloat16 \
    --trust-remote-code
