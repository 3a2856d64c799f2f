#!/usr/bin/env bash
# All measurements of docs/devices.md on a machine with one GPU, in at most eight minutes:
#
#     benchmarks/gpu.sh OUTPUT_FOLDER             # writes OUTPUT_FOLDER/gpu.md and a log per part
#     TINY=1 DEVICE=cpu benchmarks/gpu.sh OUTPUT_FOLDER   # the same parts at tiny sizes, on a CPU
#
# A part that fails or exceeds its time is reported in the table; the others still run. PYTHON names the interpreter.
set -u
out=$(mkdir -p "${1:?usage: benchmarks/gpu.sh OUTPUT_FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")" || exit 1
python=${PYTHON:-python}
device=${DEVICE:-cuda}
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0
rm -f "$out"/*.log "$out"/*.json "$out"/*.status

if [ -n "${TINY:-}" ]; then
  models="tiny tiny" batch=4 steps="--steps 1 --warmup 1" images="--images 8 --side 64 --workers 1 --batch 4"
  sizes="tiny" train="data.triplets=64 data.pairs=64 data.val_queries=24 data.queries=24 recipe.epochs=1"
else
  models="ViT-B-32 ViT-L-14" batch=128 steps="--steps 10 --warmup 3"
  images="--images 50000 --side 640 --batch 256 --sample 4096"
  sizes="quickdraw" train="recipe.epochs=2"
fi
autocast=bf16 mixed=bf16-mixed ray=--ray
[ "$device" = cpu ] && autocast=fp32 mixed=32-true
"$python" -c "import ray" 2>/dev/null || ray=

# part NAME SECONDS COMMAND...: run one part with a time limit and note its status; tiny sizes check that the parts
# run, also on a busy machine, so that their limits are wider
part() {
  local name=$1 limit=$2
  [ -n "${TINY:-}" ] && limit=$((limit * 5))
  shift 2
  echo "$name: $*"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  echo $? >"$out/$name.status"
}

number=0
for model in $models; do
  number=$((number + 1))
  part "steps-$number" 50 "$python" step_time.py --arch "$model" --device "$device" --precision $autocast \
    --batch $batch $steps --json "$out/steps-$number.json"
done
model=${models%% *}
part index 210 "$python" indexing.py --arch "$model" --device "$device" --precision $mixed --repeats 1 \
  $images $ray --json "$out/index.json"
part evaluation 60 "$python" evaluation_scale.py --alone --sizes $sizes --device "$device"
if [ "$device" = cpu ]; then
  echo "skipped: FSDP needs a GPU" >"$out/fsdp.log"
  echo skipped >"$out/fsdp.status"
else
  part fsdp 90 "$python" -m union_igrot.cli.train strategy=fsdp strategy.devices=1 $train progress=false \
    output_dir="$out/fsdp" cache_dir="$out/fsdp/cache"
fi
"$python" gpu_table.py "$out" | tee "$out/gpu.md"
