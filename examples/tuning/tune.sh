#!/bin/sh
# Makes training data of answers.jsonl, in which a group gives its failures codes of its own, and renders the job that
# teaches them to a model. Nothing is submitted: `biollm tune up` does that.
#   examples/tuning/tune.sh MODEL [FOLDER]
set -e
folder=${2:-.}
biollm tune export --from "$(dirname "$0")/answers.jsonl" -o "$folder/train.jsonl"
biollm tune fit "$1"
biollm tune render "$1" "$folder/train.jsonl" >"$folder/train.sh"
echo "Next: biollm tune up $1 $folder/train.jsonl"
