#!/usr/bin/env bash
# Prepare the wheels that run.sh needs on a machine without a network: benchmarks/gpu/wheels.sh [PACKAGE ...]
# They go to $WHEELS (default .whl in the checkout, which git ignores): Python 3.12 on x86-64 Linux, in the versions of
# constraints.txt. Without packages it takes what such a machine lacks beside torch, transformers, numba, numba-cuda,
# accelerate, safetensors, pyarrow, pandas, matplotlib and scipy. run.sh says what is missing on the machine at hand.
# Left out on purpose: Ray (hydra/launcher=basic runs without), plotly (kbit draws with matplotlib), and packages that
# lm-eval asks for but imports for other tasks alone.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS:-$root/.whl}
packages=(
  hydra-core omegaconf antlr4-python3-runtime jaxtyping wadler-lindig lm-eval datasets dill multiprocess xxhash
  requests urllib3 charset-normalizer certifi sacrebleu portalocker tabulate colorama lxml
)
[ $# = 0 ] || packages=("$@")
platforms=(--platform manylinux1_x86_64 --platform manylinux2014_x86_64)
for version in 5 12 17 24 26 27 28 31 34; do platforms+=(--platform "manylinux_2_${version}_x86_64"); done
mkdir -p "$wheels"
for package in "${packages[@]}"; do
  if [ "$package" = antlr4-python3-runtime ]; then # PyPI has its source alone, which is Python alone
    PIP_CONSTRAINT=$root/constraints.txt "$python" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$package"
  else
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      "${platforms[@]}" --constraint "$root/constraints.txt" --dest "$wheels" "$package"
  fi
done
du -cb "$wheels"/*.whl | tail -1 | awk '{printf "%.1f MiB of wheels\n", $1 / 2^20}'
