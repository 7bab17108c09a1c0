#!/usr/bin/env bash
# What this machine's GPU does with our recipes' shapes, in at most four minutes: bash benchmarks/accelerator.sh [--only STAGE,…]
# Figures go to $OUT (default: accelerator_out) line by line. Needs jax with CUDA, flax, optax, orbax-checkpoint, transformers, pydantic.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-accelerator_out}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec timeout --signal=INT 240 "${PYTHON:-python3}" benchmarks/accelerator.py --budget 220 "$@"
