#!/usr/bin/env bash
# Holds two builds of Homeroom to each other bit by bit: what they train, and what they answer with it.
#
#   tests/peers/same_bits.sh OLD NEW [MODEL_DIR] [GGUF]
#
# OLD and NEW are programs with their strategies beside them. Each trains {lora, DoRA, qlora, int8, full on a directory; lora on a GGUF
# file} x {packed, not} x {keeping activations, recomputing them} x {1, 2 threads}. All four results of a case, of both programs and both
# numbers of threads, must be the same file, and their 64 greedy tokens the same text. Ends with 1 where one differs.
#
# MODEL_DIR and GGUF default to the model and the fixture in this repository. STEPS (3) is the length of a run.
set -u
[ $# -ge 2 ] || { sed -n '2,/^set -u/s/^# \{0,1\}//p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")/../.." && pwd)
old=$(realpath "$1") new=$(realpath "$2")
model=$(realpath "${3:-$here/runtime/pocket/model}") gguf=$(realpath "${4:-$here/tests/fixtures/models/llama-gguf/model-mixed.gguf}")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

python3 - "$place/rows.jsonl" <<'P'
import json, sys
with open(sys.argv[1], "w") as rows:
    for i in range(48):
        answer = " and ".join(str(7 * i + k) for k in range(1 + i % 9))
        turns = [("user", f"{i} * 7?"), ("assistant", answer)]
        rows.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
P

run() { # program, threads, arguments: one of its commands, out of the way of this machine's plugins and models
  local program=$1 threads=$2
  shift 2
  HOMEROOM_HOME="$place/home" HOMEROOM_PLUGINS=$(dirname "$program") HOMEROOM_PLUGIN_POLICY=dev RAYON_NUM_THREADS=$threads "$program" "$@"
}

failed=0
check() { # name, model, options of fine-tune
  local name=$1 base=$2 first="" program threads out digest
  shift 2
  for program in "$old" "$new"; do
    for threads in 1 2; do
      out="$place/result"
      rm -rf "$out"
      if ! run "$program" $threads fine-tune --model-name "$base" --training-file "$place/rows.jsonl" --output-dir "$out" \
        --max-steps "${STEPS:-3}" --batch-size 16 --warmup-ratio 0 --seed 7 "$@" > "$place/log" 2>&1; then
        echo "$name: $program with $threads threads FAILED"
        tail -n 5 "$place/log"
        failed=1
        return
      fi
      if ! run "$program" $threads chat --model-dir "$out" --prompt '6 * 7?' --max-tokens 64 --temperature 0 > "$place/answer" 2> "$place/log"; then
        echo "$name: $program with $threads threads gives no answer"
        tail -n 5 "$place/log"
        failed=1
        return
      fi
      digest="$(cat "$out"/*model.safetensors | sha256sum) $(sha256sum < "$place/answer")"
      if [ "${first:=$digest}" != "$digest" ]; then
        echo "$name: $program with $threads threads DIFFERS"
        failed=1
        return
      fi
    done
  done
  echo "$name: same bits"
}

for packing in "" --no-packing; do
  for memory in "" --gradient-checkpointing; do
    options="$packing $memory"
    # shellcheck disable=SC2086 # an option that is not there is no word
    for strategy in lora qlora int8 full; do check "$strategy $options" "$model" --strategy $strategy $options; done
    # shellcheck disable=SC2086
    check "dora $options" "$model" --strategy lora --set-option use_dora=true $options
    # shellcheck disable=SC2086
    check "gguf $options" "$gguf" --strategy lora --lora-dropout 0.1 $options
  done
done
exit $failed
