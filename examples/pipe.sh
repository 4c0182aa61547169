#!/bin/sh
# Asks why the last Nextflow run in this folder failed: its log goes in through a pipe.
#   examples/pipe.sh [LOG]
cat "${1:-.nextflow.log}" | biollm complete "why did this fail?"
