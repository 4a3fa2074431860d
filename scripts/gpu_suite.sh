#!/usr/bin/env bash
# Runs everything that needs a GPU, from a bare checkout, in under nine minutes: the tests marked
# gpu, those of the kernels and their microbenchmarks, copy bandwidths, and for models with random
# weights their load time by phase, throughput and step times. Installs nothing. Writes gpu_suite.json
# and gpu_suite.md, and microbenchmarks.*, under kernels/benchmarks/results/<device>/ (or --out DIR).
# --cpu-trial tries the script without a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
for module in torch safetensors numpy; do
  "$python" -c "import $module" 2>/dev/null || { echo "$python has no $module; set PYTHON" >&2; exit 2; }
done
exec "$python" -m scripts.gpu_suite.run "$@"
