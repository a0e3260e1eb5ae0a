#!/bin/sh
# Makes runtime/pocket/model from nothing: text and random weights by make_text.py, training by Homeroom's `full` strategy.
# Run: cargo build --release && runtime/pocket/train.sh [WORK_DIR]      (measured time: README.md)
set -eu
cd "$(dirname "$0")/../.."
here=runtime/pocket
work=${1:-target/pocket}
homeroom=${HOMEROOM:-target/release/homeroom}

python3 $here/make_text.py rows "$work" --rows 50000
python3 $here/make_text.py init "$work/init"
python3 $here/make_text.py quickstart $here/quickstart

# The products of a model this small are over before a second thread has begun: on a busy machine one was five times faster.
RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-1} "$homeroom" fine-tune --strategy full --model-name "$work/init" \
  --training-file "$work/rows.jsonl" --output-dir "$work/model" --overwrite \
  --batch-size 24 --learning-rate 1.5e-3 --weight-decay 0.01

# The random weights are bf16, so the trained ones are too.
mkdir -p $here/model
for file in config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja model.safetensors; do
  cp "$work/model/$file" $here/model/
done
python3 $here/accuracy.py $here/model "$work/eval.jsonl" --homeroom "$homeroom"
