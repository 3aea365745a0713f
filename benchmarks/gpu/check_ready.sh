#!/usr/bin/env bash
# The GPU day's stages at tiny sizes on the CPU, with numba's simulator: benchmarks/gpu/check_ready.sh FOLDER
set -euo pipefail
export NUMBA_ENABLE_CUDASIM=1 CUDA_VISIBLE_DEVICES= WHEELS=/nonexistent
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$@" --ready
