#!/bin/bash -l
# llama-3.3-70b on vLLM, by biollm VERSION
#SBATCH --job-name=biollm-llama-3.3-70b
#SBATCH --partition=gpu-a100
#SBATCH --account=genomics
#SBATCH --qos=long
#SBATCH --constraint=a100&nvlink
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:a100:2
#SBATCH --cpus-per-task=32
#SBATCH --mem=256G
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=/scratch/lab/biollm/logs/biollm-%j.log
#SBATCH --no-requeue
#SBATCH --mail-type=END
#SBATCH --comment="for the lab"

set -eo pipefail
umask 077
unset VLLM_PORT SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK
module load gcc/12
module load cuda/12.8
source /home/me/envs/vllm/bin/activate
export HF_HUB_OFFLINE=1
export HF_HOME=/scratch/lab/biollm/cache/huggingface
export VLLM_NO_USAGE_STATS=1
export DO_NOT_TRACK=1
export VLLM_CACHE_ROOT=/scratch/lab/biollm/cache/vllm
unset NCCL_NET
mkdir -p /scratch/lab/biollm/cache
set -u

exec python3 /scratch/lab/biollm/biollm/lib/biollm_supervisor_HASH.py "$@" \
  --cluster university --log-dir /scratch/lab/biollm/logs --walltime 3600 --drain 120 --idle-timeout 1800 \
  --model llama-3.3-70b --gpus 2 --start-timeout 1800 -- \
  vllm serve /scratch/lab/models/meta-llama/Llama-3.3-70B-Instruct \
    --served-model-name llama-3.3-70b \
    --tensor-parallel-size 2 \
    --max-model-len 32768 \
    --gpu-memory-utilization 0.95 \
    --dtype bfloat16 \
    --enable-auto-tool-choice \
    --tool-call-parser llama3_json
