#!/usr/bin/env bash
# Sets the environment up and serves a model on this machine: smollm2 unless another is named.
#
#   scripts/serve.sh [MODEL] [chiron serve options...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup_environment.sh

model=smollm2
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  model=$1
  shift
fi
exec .venv/bin/chiron serve "$model" "$@"
