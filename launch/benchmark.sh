#!/usr/bin/env bash
# cdpo and TRL side by side on the same model, pairs and batches: pairs and tokens per second, memory, share of the floor.
#
#   launch/benchmark.sh [--cases hh lora ...] [--variants default best compact] [--rounds 5] [--help]
#
# On a CPU; launch/gpu.sh is for a GPU. Each runs in a process of its own and they step in turns. First both must compute
# the same losses and gradients, else nothing is timed. Needs the test extras and an HH file (--data). Writes
# outputs/benchmark/results.json and results.png.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root:$root/launch:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.compare "$@"
