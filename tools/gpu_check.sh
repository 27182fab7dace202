#!/usr/bin/env bash
# Checks every CUDA path on one GPU in at most ten minutes, then measures this machine against our targets.
#   tools/gpu_check.sh [FOLDER]          default: runs/gpu_check; needs an environment with ifvit (`make setup`)
#   tools/gpu_check.sh --cpu [FOLDER]    tiny sizes without a GPU: proves the commands; CUDA steps are skipped
# Writes FOLDER/gpu_check.json, FOLDER/gpu_check.md (a table for the docs) and FOLDER/logs/STEP.log. Exit code 1
# when a step fails or, on a GPU, a target is missed. PYTHON names the interpreter; default: .venv/bin/python.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda
[ "${1:-}" = --cpu ] && { device=cpu; shift; }
out=${1:-runs/gpu_check} python=${PYTHON:-.venv/bin/python}
# DeepSpeed compiles here, so that a step that is killed leaves no lock where other programs would wait for it.
export TOKENIZERS_PARALLELISM=false TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$(realpath -m "$out")/extensions}
fail() { echo "gpu_check: $1" >&2; exit 2; }
[ $device = cpu ] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "torch sees no CUDA device; --cpu proves the commands without one"
[ ! -e "$out" ] || [ -e "$out/steps.tsv" ] || fail "$out is not a folder of this script; name another one"
rm -rf "$out" && mkdir -p "$out/logs" && : >"$out/steps.tsv" && began=$SECONDS

record() { # NAME RESULT SECONDS REASON
    printf '%s\t%s\t%s\t%s\n' "$@" >>"$out/steps.tsv"
    printf '%-24s %-8s %4s s  %s\n' "$@"
}

step() { # NAME COMMAND...: run it; the reason of a failure is the last line of its log
    local name=$1 start=$SECONDS log=$out/logs/$1.log && shift
    if timeout 240 "$@" >"$log" 2>&1; then
        record "$name" passed $((SECONDS - start)) ""
    else
        record "$name" failed $((SECONDS - start)) "$(tail -n 1 "$log" | tr -d '\t' | cut -c 1-200)"
    fi
}

ifvit() { step "$1" "$python" -m ifvit "${@:2}"; } # NAME ARGUMENTS...: run a verb as a step

cuda() { # FUNCTION NAME ...: run a step that only a GPU can run
    if [ $device = cpu ]; then record "$2" skipped 0 "needs a CUDA device"; else "$@"; fi
}

train() { # train_NAME FLAGS...: eight small steps with a checkpoint and a grid of samples
    ifvit "$1" train --recipe scenes_paper --run "$out/runs/${1#train_}" --shards "$out/shards" --max_steps 8 \
        --optim.warmup_steps 2 --optim.cooldown_steps 2 --checkpoint_every 4 --sample_grid.every 4 \
        --sample_grid.num_steps 2 --log_every 1 "${@:2}"
}

parallel() { # COMMAND...: run a step in the background, with at most $at_once of them
    "$@" &
    while [ "$(jobs -rp | wc -l)" -ge $at_once ]; do wait -n; done
}

if [ $device = cuda ]; then
    half=bf16 at_once=4
    bench_train=(--backbone small --batch_size 256 --compile true --steps 4 --rounds 5)
    bench_checkpoint=(--batch_size 256 --every 100 --num_steps 100)
    bench_generate=(--backbone small --batch_size 64 --precision bf16 --compile true --rounds 5)
    bench_loader=(--num_samples 4000 --batch_size 256 --num_workers 4 --rounds 2)
else
    half=fp32 at_once=1
    bench_train=(--backbone tiny --batch_size 1 --rounds 1)
    bench_checkpoint=(--batch_size 1 --every 1 --num_steps 1)
    bench_generate=(--backbone tiny --batch_size 1 --num_steps 2 --rounds 1)
    bench_loader=(--num_samples 16 --batch_size 4 --num_workers 1 --rounds 1)
fi

# Smoke tests: every path computes, saves and is read back.
ifvit scenes scenes --folder "$out/images" --num_images 64
ifvit encode encode --config configs/data/scenes.yaml --images "$out/images/train2014" --output "$out/shards" \
    --captions "$out/images/annotations/captions_train2014.json" --device $device --precision $half
parallel train train_plain --engine.precision fp32
parallel train train_bf16 --engine.precision bf16
parallel train train_checkpointing --engine.activation_checkpointing true --engine.precision $half
parallel cuda train train_fp16 --engine.precision fp16
parallel cuda train train_muon --optim.optimizer muon --engine.precision bf16
parallel train train_attention_sdpa --engine.attention sdpa --engine.precision $half
parallel train train_attention_math --engine.attention math --engine.precision $half
for attention in flash cudnn efficient; do
    parallel cuda train train_attention_$attention --engine.attention $attention --engine.precision bf16
done
if "$python" -c 'import xformers' 2>/dev/null || [ $device = cpu ]; then
    parallel cuda train train_attention_xformers --engine.attention xformers --engine.precision bf16
else
    record train_attention_xformers skipped 0 "xformers is not installed"
fi
parallel cuda train train_compile --engine.compile true --engine.precision bf16
for stage in 1 2 3; do
    parallel train train_zero_$stage --engine.backend deepspeed --engine.zero_stage $stage --engine.precision $half
done
parallel cuda train train_offload --engine.backend deepspeed --engine.offload_optimizer true --engine.precision bf16
wait
ifvit train_resume train --config "$out/runs/plain/config.yaml" --max_steps 10
prompts=(--weights "$out/runs/plain" --prompt "three blue squares" --num_steps 4)
parallel ifvit generate generate "${prompts[@]}" --device $device --output "$out/generated"
parallel ifvit generate_both generate "${prompts[@]}" --device $device --method both --output "$out/aligned"
parallel cuda ifvit generate_cuda_graphs generate "${prompts[@]}" --compile true --output "$out/compiled"
parallel ifvit evaluate evaluate --weights "$out/runs/plain" --shards "$out/shards" --protocol scenes \
    --images "$out/images/train2014" --protocol.num_samples 16 --protocol.sampling.num_steps 4
parallel cuda step pytest_gpu "$python" -m pytest -q -m gpu tests
wait

# Measurements, one at a time.
for verb in train generate loader checkpoint; do
    flags="bench_$verb[@]"
    ifvit "bench_$verb" bench $verb --json "${!flags}"
done

"$python" - "$out" $device $((SECONDS - began)) <<'PYTHON'
import json, subprocess, sys
from importlib.metadata import version
from pathlib import Path

out, device, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
names, rows = ("name", "result", "seconds", "reason"), (out / "steps.tsv").read_text().splitlines()
steps = [dict(zip(names, row.split("\t"), strict=True)) for row in rows]

def read(verb: str) -> dict:
    """The JSON object that `ifvit bench VERB` printed; empty when the benchmark failed."""
    text = (out / "logs" / f"bench_{verb}.log").read_text()
    try:
        return json.JSONDecoder().raw_decode(text[text.index("{") :])[0]
    except ValueError:
        return {}

bench = {verb: read(verb) for verb in ("train", "generate", "loader", "checkpoint")}
best = next((row for row in bench["train"].get("rows", ()) if row["setting"] == "cross_attention_intermediate"), {})
goals = (
    ("MFU of a training step, intermediate fusion", best.get("mfu"), ">=", 0.45),
    ("training steps per second, times U-ViT's recipe", bench["train"].get("vs_uvit_recipe"), ">=", 3.0),
    ("share of training time that saves stall", bench["checkpoint"].get("stall_share"), "<=", 0.05),
    ("samples/s of the loader, times those of training",
     bench["loader"]["samples_per_s"] / best["images_per_s"] if best and bench["loader"] else None, ">=", 1.0),
)
targets = [
    {"name": name, "value": value, "target": f"{sign} {goal}",
     "met": None if device == "cpu" else bool(value is not None and (value >= goal if sign == ">=" else value <= goal))}
    for name, value, sign, goal in goals
]
git, where = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True), bench["train"].get("device", device)
report = {"device": where, "torch": version("torch"), "commit": git.stdout.strip(), "seconds": seconds,
          "steps": steps, "bench": bench, "targets": targets}
(out / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
verdict = {True: "met", False: "missed", None: "not judged"}
count = {result: sum(step["result"] == result for step in steps) for result in ("passed", "failed", "skipped")}
lines = [f"{where}, torch {version('torch')}, {seconds} s: {count}", "", "| measure | value | target | |", "|---|---|---|---|"]
for t in targets:
    value = "not measured" if t["value"] is None else f"{t['value']:.3g}"
    lines.append(f"| {t['name']} | {value} | {t['target']} | {verdict[t['met']]} |")
(out / "gpu_check.md").write_text("\n".join(lines) + "\n")
print("\n".join(lines))
sys.exit(bool(count["failed"]) or any(t["met"] is False for t in targets))
PYTHON
