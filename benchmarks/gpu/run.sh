#!/usr/bin/env bash
# The GPU day on this machine's card: benchmarks/gpu/run.sh [FOLDER] [--only STAGE ...]. See README.md here.
# Packages that are not installed come from the wheels that wheels.sh prepared, in $WHEELS (default .whl).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS:-$root/.whl}
extra=
if compgen -G "$wheels/*.whl" >/dev/null; then
  extra=$(mktemp -d)
  trap 'rm -rf "$extra"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$extra" "$wheels"/*.whl
fi
# kbit is the checkout, whatever is installed, and the cases of its tests are those of the stages.
export PYTHONPATH=$root:$root/tests/kernels:$root/benchmarks/gpu${extra:+:$extra}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
"$python" "$root/benchmarks/gpu/needs.py" || exit 3
status=0
"$python" "$root/benchmarks/gpu/day.py" "$@" || status=$?
exit "$status"
