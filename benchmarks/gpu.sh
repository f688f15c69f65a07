#!/usr/bin/env bash
# Run the CUDA tests and the speed table on a machine with a GPU: benchmarks/gpu.sh OUTPUT_FOLDER
# Needs torch with Triton, transformers, peft, pyarrow and pytest; takes under 8 minutes.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUTPUT_FOLDER}
python=${PYTHON:-python3}
mkdir -p "$out"
cd "$(dirname "$0")/.." || exit
{ nvidia-smi; "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'; } >"$out/machine.txt" 2>&1
timeout 270 "$python" -m pytest tests/gpu -q -p no:cacheprovider 2>&1 | tee "$out/tests.txt"
status=${PIPESTATUS[0]}
timeout 200 "$python" -m benchmarks.gpu "$out" 2>&1 | tee "$out/gpu.txt" || status=1
exit "$status"
