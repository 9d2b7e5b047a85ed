#!/usr/bin/env bash
# SFT of a tiny model on the chosen responses of an HH file, then gaussian DPO from that checkpoint.
#
#   launch/hh_tiny.sh [FILE] [KEY=VALUE ...]      FILE: a .jsonl.gz of chosen / rejected dialogues
#
# Both stages hold out the same rows (same seed, same eval_size): DPO is judged on rows that neither stage has seen.
# KEY=VALUE goes to both stages. Started again, it goes on where it was; a finished stage is not trained twice.
set -euo pipefail

file=${1:-../shared/data/hh-harmless-base-test.jsonl.gz}
shift || true
root=${OUTPUT_ROOT:-outputs}
shared=(
  dataset=jsonl "dataset.path=$file" dataset.eval_size=0.2 dataset.max_prompt_tokens=64 dataset.max_response_tokens=96
  "output_root=$root" trainer.tokens_per_micro_batch=8192 trainer.log_every=10
  trainer.threads=1 optimizer.schedule=cosine seed=0
)

cdpo-train name=hh-tiny-sft "${shared[@]}" loss=sft model=tiny model.vocab_size=2048 \
  optimizer.learning_rate=3e-3 trainer.epochs=2 trainer.eval_every=1000 "$@"
cdpo-train name=hh-tiny-gaussian "${shared[@]}" loss=gaussian model.name_or_path="$root/hh-tiny-sft/model" \
  optimizer.learning_rate=3e-4 trainer.epochs=1 trainer.eval_every=1000 "$@"

python3 - "$root/hh-tiny-gaussian/summary.json" <<'PYTHON'
import json
import sys

metrics = json.load(open(sys.argv[1]))["metrics"]
accuracy, error = metrics["eval/rewards/accuracies"], metrics["eval/rewards/accuracies_stderr"]
print(f"held-out accuracy {accuracy:.3f} +- {error:.3f} (standard error), {(accuracy - 0.5) / error:.1f} of them above 0.5")
PYTHON
