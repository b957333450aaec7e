#!/usr/bin/env bash
# torchvision's ResNet-18 on Fashion-MNIST: teach it, compress it, keep the result. A small budget, under an hour on
# 2 cores: it shows that both stages and the final training work on a real network, not how far the search can go.
# usage: bench/resnet18_fashion_mnist.sh DIR_OF_FASHION_MNIST
set -euo pipefail
data="fashion-mnist:$1"
out="$(dirname "$0")/results/resnet18_fashion_mnist"
work="$(mktemp -d)"
mkdir -p "$out"

n2n-fast teach --arch resnet18 --data "$data" --epochs 8 --out "$work/resnet18.pt" 2>&1 | tee "$out/teach.log"
n2n-fast run --teacher "$work/resnet18.pt" --data "$data" --updates 2 --rollouts 4 --epochs 0.02 --final-epochs 0.6 \
  --out "$work/run" 2>&1 | tee "$out/run.log"
cp "$work/run/"{result.json,history.jsonl,architecture.json,config.json} "$out/"
