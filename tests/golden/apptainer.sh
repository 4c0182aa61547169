#!/bin/bash
# codellama-34b on vLLM, by biollm VERSION
#SBATCH --job-name=biollm-codellama-34b
#SBATCH --partition=gpu-a100
#SBATCH --account=genomics
#SBATCH --qos=long
#SBATCH --constraint=a100&nvlink
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:a100:1
#SBATCH --cpus-per-task=16
#SBATCH --mem=128G
#SBATCH --time=1-02:00:00
#SBATCH --signal=B:USR1@120
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

exec apptainer exec --nv --bind=/scratch/lab/biollm --bind=/scratch/lab/biollm/logs --bind=/scratch/lab/biollm/cache --bind=/scratch/lab/models --bind=/data:/data:ro /images/vllm.sif \
  python3 /scratch/lab/biollm/biollm/lib/biollm_supervisor_HASH.py "$@" \
  --cluster university --log-dir /scratch/lab/biollm/logs --walltime 93600 --drain 120 --idle-timeout 0 \
  --model codellama-34b --gpus 1 --start-timeout 1200 -- \
  vllm serve /scratch/lab/models/codellama/CodeLlama-34b-Instruct-hf \
    --served-model-name codellama-34b \
    --tensor-parallel-size 1 \
    --max-model-len 16384 \
    --dtype bfloat16
