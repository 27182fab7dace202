#!/usr/bin/env bash
# Everything that docs/results.md reports: renders the sets, trains every variant with three seeds,
# evaluates them and writes the page. Run again to continue; about two hours on two slow cores.
#   tools/scenes_study.sh [FOLDER] [PROCESSES]       default: runs/study, one process for each core
set -euo pipefail
cd "$(dirname "$0")/.."
study=${1:-runs/study} processes=${2:-$(nproc)}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false # a second thread does not speed up steps of so small models
ifvit=.venv/bin/ifvit

in_parallel() { # each line of standard input is one command's arguments
    xargs -P "$processes" -L 1 $ifvit
}

held_out_captions=(--shards "$study/shards/val2014" --images "$study/images/val2014")
held_out_classes=(--shards "$study/class_shards/val2014" --images "$study/class_images/val2014")
seeds="1 2 3"

declare -A fusion=( # the fusion map, and the number of text blocks
    [cross_early]="7*cross_attention;0" [cross_intermediate]="image 5*cross_attention image;1"
    [concat_early]="7*concat;0" [concat_intermediate]="image 5*concat image;1"
    [cross_image_blocks]="image 5*cross_attention image;0" [cross_text_branch]="7*cross_attention;1"
    [adaln_early]="7*adaln;0" [adaln_intermediate]="image 5*adaln image;1"
)
backbone_flags() { # NAME of a variant; xargs removes the quotes
    echo "--backbone.fusion '${fusion[$1]%;*}' --backbone.num_text_blocks ${fusion[$1]#*;}"
}
declare -A equal_compute=( # steps with the cost of 2,000 steps of cross_early (ifvit cost --json)
    [cross_intermediate]=1865 [concat_early]=1186 [concat_intermediate]=1282
)
declare -A architecture=(
    [transformer]="" [uvit]="--backbone.long_skip true --backbone.width 100"
    [unet]="--backbone unet_tiny"
)

for split in "train2014 6000" "val2014 1000"; do
    echo scenes --folder "$study/images" --split "${split% *}" --num_images "${split#* }"
done | in_parallel
for split in "train2014 6000" "val2014 300"; do
    echo scenes --classes --folder "$study/class_images" --split "${split% *}" --num_images "${split#* }"
done | in_parallel
for split in train2014 val2014; do
    echo encode --config configs/data/scenes.yaml --images "$study/images/$split" \
        --captions "$study/images/annotations/captions_$split.json" --output "$study/shards/$split"
    echo encode --config configs/data/scene_classes.yaml --images "$study/class_images/$split" \
        --output "$study/class_shards/$split"
done | in_parallel

for seed in $seeds; do
    for name in "${!fusion[@]}"; do
        echo train --config configs/train/scenes_paper.yaml --shards "$study/shards/train2014" \
            --run "$study/$name/seed$seed" --seed "$seed" "$(backbone_flags "$name")"
    done
    for name in "${!equal_compute[@]}"; do
        steps=${equal_compute[$name]}
        echo train --config configs/train/scenes_paper.yaml --shards "$study/shards/train2014" \
            --run "$study/equal_compute/$name/seed$seed" --seed "$seed" --sample_grid.every 0 \
            "$(backbone_flags "$name")" --max_steps "$steps" --checkpoint_every "$steps" \
            --optim.cooldown_steps $((steps * 2 / 3))
    done
    for name in "${!architecture[@]}"; do
        echo train --config configs/train/scenes_classes.yaml --shards "$study/class_shards/train2014" \
            --run "$study/classes/$name/seed$seed" --seed "$seed" ${architecture[$name]}
    done
done | in_parallel

for seed in $seeds; do
    for name in "${!fusion[@]}"; do
        echo evaluate --protocol scenes --protocol.num_samples 256 "${held_out_captions[@]}" \
            --weights "$study/$name/seed$seed" --steps [1000,2000]
    done
    for name in "${!equal_compute[@]}"; do
        echo evaluate --protocol scenes --protocol.num_samples 256 "${held_out_captions[@]}" \
            --weights "$study/equal_compute/$name/seed$seed"
    done
    for name in "${!architecture[@]}"; do
        echo evaluate --protocol scenes --protocol.num_samples 300 "${held_out_classes[@]}" \
            --weights "$study/classes/$name/seed$seed" --steps all
    done
done | in_parallel
for seed in $seeds; do
    for name in cross_early cross_intermediate concat_early concat_intermediate; do
        echo evaluate --protocol scenes --protocol.num_samples 256 "${held_out_captions[@]}" \
            --weights "$study/$name/seed$seed" --guidance_scales [3]
    done
done | in_parallel

variants=("$study"/{cross,concat}_{early,intermediate})
for run in "${variants[@]/%//seed1}"; do
    $ifvit evaluate --protocol object_count_scenes --weights "$run"
done
$ifvit analyze attention "${variants[@]/%//seed1}" --shards "$study/shards/val2014" \
    --num_prompts 256 --trim 0 --sampling.num_steps 20 --sampling.guidance_scale 1.5
$ifvit report paper "$study"/c*/seed? --output "$study/paper"
$ifvit report "$study"/{adaln,cross}_{early,intermediate}/seed? --output "$study/adaln.html"
$ifvit report "$study"/classes/*/seed? --output "$study/classes.html"
