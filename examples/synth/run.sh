#!/usr/bin/env bash
# VARD on photo grids, without any model: two example servers, 5 % errors, 10 % wrong answers.
# Hardware: any; two busy cores take a minute and a half for 40 inputs.
# Writes $OUT/sft.parquet, rl.parquet, records.parquet, card.md and card.html.
#
#   N=500 OUT=outputs/synth bash examples/synth/run.sh [KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/../.."

N=${N:-500}
OUT=${OUT:-outputs/synth}
PYTHON=${PYTHON:-.venv/bin/python}
CONFIG=recipes/avar/synth/photo_grid.yaml

"$PYTHON" -m examples.synth.inputs --n "$N" --out "$OUT/inputs.parquet"
"$PYTHON" -m examples.synth.server --n "$N" --port 8011 --log "$OUT/vision.jsonl" & vision=$!
"$PYTHON" -m examples.synth.server --n "$N" --port 8012 --log "$OUT/language.jsonl" & language=$!
trap 'kill $vision $language' EXIT
for port in 8011 8012; do
    until "$PYTHON" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/health')" 2> /dev/null; do
        sleep 0.5
    done
done

settings=("out=$OUT" "input.files=[$OUT/inputs.parquet]" "$@")
"$PYTHON" -m avar_verl synth estimate --config "$CONFIG" "${settings[@]}"
"$PYTHON" -m avar_verl synth run --config "$CONFIG" "${settings[@]}"
"$PYTHON" -m avar_verl synth inspect "$OUT" --n 1
