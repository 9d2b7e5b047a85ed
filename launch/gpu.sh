#!/usr/bin/env bash
# All that is to be known of cdpo on a GPU, in one table and in at most 8 minutes: its tests that need one, how long a run
# takes to its first step, and cdpo beside TRL on a model of 1.2 billion weights.
#
#   launch/gpu.sh [--minutes 8] [--parts tests start benchmark] [--cases 1b-lora-64 ...] [--data hh.jsonl.gz] [--help]
#
# What there was no time for is named. Needs TRL, pytest and an HH file; wandb is not needed. Writes
# outputs/benchmark/gpu.json.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/launch:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
