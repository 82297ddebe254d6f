#!/usr/bin/env bash
# Runs what needs a GPU, within nine minutes, without a network:
#
#     benchmarks/gpu.sh DATA [RESULTS [TIMM_CHECKOUT]]
#
# DATA is a folder of Parquet files (../shared/data/clothing-224); results go to RESULTS, by default
# benchmarks/results, as each part ends, and replace those that are there. A part that fails or takes too long leaves the
# others as they are, and the script ends with 1. DEVICE=cpu SMALL=1 tries the script with tiny sizes, without a GPU.
set -u
here=$(cd "$(dirname "$0")" && pwd)
data=${1:?usage: benchmarks/gpu.sh DATA [RESULTS [TIMM_CHECKOUT]]}
results=${2:-$here/results}
checkout=${3:-}
device=${DEVICE:-cuda}
mkdir -p "$results" || exit 2
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
workers=$(($(nproc) < 16 ? $(nproc) : 16))
failed=0

part() {  # seconds, name of the result, command, its options
    local limit=$1 name=$2 command=$3 code
    shift 3
    [ -z "${SMALL:-}" ] || limit=$((4 * limit))  # a CPU takes its time to start
    echo "== $name"
    timeout -k 5 "$limit" python -W ignore "$here/$command.py" --device "$device" --overwrite \
        --json "$results/$name-$device.json" "$@"
    code=$?
    [ $code = 0 ] || { failed=1; echo "== $name ended with $code, its limit was $limit s"; }
}

if [ -n "${SMALL:-}" ]; then
    model=(--model test_resnet --img-size 56 -b 8) steps=(--steps 1) rounds=(--rounds 1) amp=(--mixed-precision bf16)
    modes=eager workers=0 part_data=(--train-split validation) copies=1
else
    model=(--model resnet50 --img-size 224 -b 256) steps=(--steps 5) rounds=(--rounds 5) part_data=() copies=8
    amp=(--mixed-precision bf16 --channels-last --pin-mem) modes=compiled
fi
step=("${model[@]}" "${steps[@]}" "${rounds[@]}" --amp-dtype bfloat16 --channels-last)

part 50 smoothing smoothing "${model[@]}" "${steps[@]}" "${rounds[@]}" --calls 50
part 50 step step "${step[@]}" --mixsize-adapt b+
part 40 step-multiple-8 step "${step[@]}" --mixsize-adapt b+ --mixsize-batch-multiple 8
part 40 step-d+ step "${step[@]}" --mixsize-adapt d+
part 190 epoch epoch --data "$data" --repeat $copies -j "$workers" "${model[@]}" "${rounds[@]}" "${amp[@]}" \
    "${part_data[@]}"
[ "$modes" = compiled ] && part 120 step-compiled step "${step[@]}" --modes compiled
[ -n "$checkout" ] && part 50 train_vs_timm train_vs_timm "$checkout" --data "$data" -j "$workers" "${model[@]}" \
    --rounds 1 --amp --amp-dtype bfloat16 --channels-last "${part_data[@]}"
exit $failed
