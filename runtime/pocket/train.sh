#!/bin/sh
# Makes runtime/pocket/model from nothing: text and random weights by make_text.py, training by Homeroom's `full` strategy.
# Run: cargo build --release && runtime/pocket/train.sh [WORK_DIR]      (measured time: README.md)
set -eu
cd "$(dirname "$0")/../.."
here=runtime/pocket
work=${1:-target/pocket}
homeroom=${HOMEROOM:-target/release/homeroom}

python3 $here/make_text.py rows "$work" --rows 50000
python3 $here/make_text.py rows "$work/more" --rows 15000 --seed 2
python3 $here/make_text.py init "$work/init"
python3 $here/make_text.py quickstart $here/quickstart

# The products of a model this small are over before a second thread has begun: on a busy machine one was five times faster.
RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-1}
export RAYON_NUM_THREADS

stage() { # FROM ROWS TO LEARNING_RATE
  "$homeroom" fine-tune --strategy full --model-name "$1" --training-file "$2" --output-dir "$3" --overwrite \
    --batch-size 24 --learning-rate "$4" --weight-decay 0.01
}
stage "$work/init" "$work/rows.jsonl" "$work/first" 1.5e-3
stage "$work/first" "$work/more/rows.jsonl" "$work/model" 1e-3

# The random weights are bf16, so the trained ones are too.
mkdir -p $here/model
for file in config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja model.safetensors; do
  cp "$work/model/$file" $here/model/
done
python3 $here/accuracy.py $here/model "$work/eval.jsonl" --homeroom "$homeroom"
