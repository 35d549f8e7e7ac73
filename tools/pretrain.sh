#!/usr/bin/env bash
# Trains, judges and packs the two runs that ship with the package: brainldm/pretrained. About two hours on two CPU cores.
# Usage: tools/pretrain.sh FOLDER      (a new folder; stopped, it goes on where it was)
set -euo pipefail
out=${1:?"usage: tools/pretrain.sh FOLDER"}
shelf=$(cd "$(dirname "$0")/../brainldm" && pwd)/pretrained
mkdir -p "$out" && cd "$out"
[ -f phantom/phantom.json ] || brainldm phantom phantom --num-subjects 200 --seed 0

brainldm train autoencoder phantom --run phantom-128 --total-images 16000 --validate-every 4000 --resume
brainldm train ldm phantom --run phantom-128 --total-images 40000 --early-images 4000 --resume
brainldm reconstruct phantom-128 phantom --split test
brainldm evaluate phantom-128 phantom --steps 15 --sampler dpmpp

brainldm train autoencoder phantom --run phantom-128-codes --kind vq --num-embeddings 256 --total-images 24000 --resume
brainldm train prior phantom --run phantom-128-codes --total-images 40000 --resume
brainldm reconstruct phantom-128-codes phantom --split test
brainldm bits phantom-128-codes phantom
brainldm evaluate phantom-128-codes phantom --generator prior

reason="Synthetic subjects: no scan of a person is among the training data, so no sample can repeat one."
for name in phantom-128 phantom-128-codes; do
    rm -rf "$shelf/$name"
    brainldm share "$name" --out "$shelf/$name" --without-audit "$reason"
done
