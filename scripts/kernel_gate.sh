#!/usr/bin/env bash
# Compiles every Triton kernel ahead of time for the GPUs it is for, without one, and fails where the
# machine code is not what it should be. What it checks: docs/kernels.md. Options: --help.
#
# Compiles with the environment's Triton and with the one of GPU machines, which is installed into
# build/ at the first run; --installed and --sample need neither that nor the network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET

GPU_TRITON=3.6.0
target=build/triton-3.6

say() { printf 'kernel gate: %s\n' "$*" >&2; }
die() { say "$@"; exit 2; }

python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
for module in torch triton; do
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
    die "$python has no $module; run scripts/setup_environment.sh --dev, or set PYTHON"
done

# Into a folder beside it first, so that one cut short is not taken for a whole one.
install_gpu_triton() {
  say "installing triton $GPU_TRITON into $target"
  rm -rf "$target.part" "$target"
  mkdir -p build
  "$python" -m pip --disable-pip-version-check install -qq --no-deps --target "$target.part" "triton==$GPU_TRITON" ||
    die "triton $GPU_TRITON cannot be installed, so the kernels cannot be compiled as GPU machines do;" \
      "is a package index reachable? (--installed does without)"
  mv "$target.part" "$target"
}

case " $* " in
  *" --installed "* | *" --sample "* | *" --help "* | *" -h "*) ;;
  *) [[ -d $target/triton-$GPU_TRITON.dist-info ]] || install_gpu_triton ;;
esac
exec "$python" -m scripts.kernel_gate.run "$@"
