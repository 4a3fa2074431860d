#!/usr/bin/env bash
# Sets the environment up and runs every test that needs no GPU. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup_environment.sh --dev
exec .venv/bin/python -m pytest "$@"
