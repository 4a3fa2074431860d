#!/usr/bin/env bash
# Generates the gRPC stubs from proto/ into chiron_engine/rpc/v1, or into the folder given as first argument.
#
# The generator is pinned to an old release: its output works on every protobuf runtime we support,
# while newer generators refuse older runtimes. It lives in .protoc, apart from the environment,
# because installing it normally would drag protobuf down.
set -euo pipefail
cd "$(dirname "$0")/.."

out="${1:-chiron_engine/rpc/v1}"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi

if ! PYTHONPATH=.protoc "$python" -c "import grpc_tools.protoc" 2>/dev/null; then
  "$python" -m pip install --quiet --no-deps --target .protoc "grpcio-tools==1.63.2" >&2
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
PYTHONPATH=.protoc "$python" -W ignore -m grpc_tools.protoc -I proto \
  --python_out="$work" --pyi_out="$work" --grpc_python_out="$work" proto/chiron/v1/*.proto

# types.proto holds messages only, so its service file would be an empty shell.
rm -f "$work/chiron/v1/types_pb2_grpc.py"
mkdir -p "$out"
for file in "$work"/chiron/v1/*; do
  sed -E 's/^from chiron\.v1 import /from . import /' "$file" >"$out/$(basename "$file")"
done
