#!/usr/bin/env bash
# Prints the folder of vLLM's environment (install_vllm.sh) with TRL and PEFT added: nine packages, none replaced.
# usage: install_trl.sh [--check]
set -euo pipefail
env=$("$(dirname "$0")/install_vllm.sh" "$@")
done=$env/.ready-trl-1.16.0
if [ ! -e "$done" ]; then
    if [ "${1:-}" = --check ]; then echo "no TRL in $env: run tests/real/install_trl.sh" >&2; exit 1; fi
    exec 9>"$env.lock"; flock 9
    "$env/bin/uv" pip install -q -p "$env/bin/python" --overrides "$env/overrides.txt" trl==1.16.0 peft==0.21.2 >&2
    touch "$done"
fi
echo "$env"
