#!/usr/bin/env bash
# Everything that only a GPU can tell, in the order of what it is worth, within so many minutes:
#
#     scripts/gpu_run.sh [FOLDER] [MINUTES]          (runs/gpu, 13)
#
# Results are written as they come: FOLDER/NAME.log of each part, FOLDER/parts.tsv with how it ended, FOLDER/results/DEVICE/*.jsonl of the
# benchmarks, which belong into benchmarks/results. Started again with the same FOLDER it goes on: what is done is not done again.
# PYTHON names the interpreter; without it that of .venv is taken, or python3. The kernels need torch, triton, einops, numpy, PyYAML,
# tqdm and pytest (quicker with pytest-xdist), the training step also torchvision, matplotlib, pillow and safetensors; its rows `engine` need
# deepspeed, `Hugging Face` transformers.
# Without a GPU it is a rehearsal: small shapes, and the GPU's tests are skipped.
# Exit status: 0 all is done, 1 a part failed, lacked a package or found no time, 2 it could not begin.
set -uo pipefail
root=$(realpath "$(dirname "$0")/..")
out=$(realpath -m "${1:-$root/runs/gpu}") minutes=${2:-13}
python=${PYTHON:-$([[ -x $root/.venv/bin/python ]] && echo "$root/.venv/bin/python" || echo python3)}
python=$(realpath -s "$(type -P "$python")" 2>/dev/null) # of the caller's folder, like FOLDER
cd "$root" || exit 2
[[ $minutes =~ ^[0-9]+$ ]] || { echo "MINUTES: $minutes is no whole number"; exit 2; }
"$python" -c "import torch, pytest" || { echo "PYTHON: ${python:-${PYTHON:-python3}} cannot import torch and pytest"; exit 2; }
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out" && touch "$out/parts.tsv" || exit 2
deadline=$((SECONDS + 10#$minutes * 60)) unfinished=0

has() { "$python" -c "import $1" 2>/dev/null; }

told() { # NAME STATUS SECONDS
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$out/parts.tsv"
    printf '%-22s %-14s %4s s\n' "$1" "$2" "$3"
}

part() { # NAME MOST_SECONDS COMMAND ...: runs it, unless it is done
    local name=$1 most=$2 left=$((deadline - SECONDS)) begin=$SECONDS
    shift 2
    grep -qP "^$name\tdone\t" "$out/parts.tsv" && return
    if ((left < 10)); then
        told "$name" "no time left" 0
        unfinished=1
        return
    fi
    timeout --kill-after=5 $((most < left ? most : left)) "$@" >"$out/$name.log" 2>&1
    case $? in
        0) told "$name" done $((SECONDS - begin)) ;;
        124 | 137) told "$name" "out of time" $((SECONDS - begin)) && unfinished=1 ;;
        *) told "$name" FAILED $((SECONDS - begin)) && unfinished=1 && tail -n 5 "$out/$name.log" ;;
    esac
}

tests() { # arguments of pytest, for the tests that want a GPU
    "$python" -m pytest -m gpu -p no:cacheprovider $limit "$@"
}
bench() { "$python" -m video_mae bench kernels "output=$out/results" "$@"; }
step() { "$python" -m video_mae bench step "output=$out/results" "$@"; }
facts() { nvidia-smi 2>&1 || true; "$python" -m torch.utils.collect_env; }
# The shell's own functions have to run under `timeout`, which starts programs.
export -f tests bench step facts
limit=$(has pytest_timeout && echo --timeout=120)
export python out limit
run() { part "$1" "$2" bash -c 'set -o pipefail; "$@"' _ "${@:3}"; }

processes=()
has xdist && processes=(-n 8)
# What is measured where; without a GPU the smallest of each.
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    at_presets=("shapes=encoder,decoder base,decoder dual base" providers=sdpa,ours) losses=()
    lengths=(shapes=length providers=sdpa,ours) others_of_attention=(shapes=fine-tune,decoder providers=sdpa,ours)
    base=(presets=base compiled=base) others=(presets=small,large,huge compiled=)
else
    echo "no GPU: a rehearsal"
    at_presets=(quick=true providers=ours) losses=("${at_presets[@]}") lengths=("${at_presets[@]}") others_of_attention=("${at_presets[@]}")
    base=(presets=small batch=1 side=32 rounds=2) others=()
fi

run facts 60 facts
kernel_tests=(tests/gpu/test_attention.py tests/gpu/test_tubelets.py tests/gpu/test_reconstruction.py tests/gpu/test_contrastive.py)
run kernels_right 300 tests "${processes[@]}" "${kernel_tests[@]}" -k "not more_than"
run attention 150 bench ops=attention "${at_presets[@]}"
run losses 180 bench ops=gather,embed,reconstruction,contrastive,joint "${losses[@]}"
if has safetensors; then
    run step 200 step "${base[@]}"
else
    told step "needs safetensors" 0
    unfinished=1
fi
run training 240 tests tests/gpu/test_training.py tests/gpu/test_loading.py tests/gpu/test_benchmark.py
run lengths 150 bench ops=attention "${lengths[@]}"
run other_attention 180 bench ops=attention "${others_of_attention[@]}"
((${#others[@]})) && has safetensors && run step_of_others 240 step "${others[@]}"
run large_inputs 120 tests "${kernel_tests[@]}" -k more_than
if command -v compute-sanitizer >/dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else a read beyond a tensor finds the allocator's memory
    for tool in memcheck racecheck; do
        run "$tool" 240 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest -m gpu -p no:cacheprovider tests/gpu/test_attention.py -k "nothing_beyond or extreme_logits"
    done
else
    told sanitizer "not installed" 0
fi
exit $unfinished
