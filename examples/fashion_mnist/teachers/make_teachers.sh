#!/bin/sh
# Train the quick start's two teachers on all 60,000 training images and export them beside this file.
# Run from the repository's root, with the package installed (`.venv/bin/activate`) and Debian's dataset-fashion-mnist.
set -eu
here=examples/fashion_mnist
data=output/fashion_mnist_full
runs=output/teachers

[ -f "$data/train.tar" ] || python $here/make_sample.py --full --out "$data"

# Arguments: name, model, epochs, seed.
make_teacher() {
    rm -rf "$runs/$1"
    # The recipe has the pixels and the augmentation; without teachers this is cross-entropy.
    python train_distill.py --recipe quickstart --data-dir "$data" --train-split train.tar --val-split validation.tar \
        --model "$2" --model-kwargs 'channels=(32,64,96,128)' output_stride=8 \
        --epochs "$3" --lr 0.2 --sched-on-updates --warmup-epochs 2 --warmup-lr 0.02 --weight-decay 5e-4 \
        --checkpoint-hist 1 --channels-last --workers 0 --seed "$4" \
        --output "$runs" --experiment "$1"
    # The last epoch's weights: the best on the test images would have been chosen by them.
    python -m timm_mealv2.cli.hub export "$runs/$1/last.pth.tar" --out "$here/teachers/$1"
}

make_teacher teacher_a resnet18 12 0
make_teacher teacher_b resnet10t 8 1
