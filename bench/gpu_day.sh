#!/usr/bin/env bash
# The first day on a GPU: all that is worth knowing in a quarter of an hour, see docs/gpu.md.
#
#     bash bench/gpu_day.sh --wheels DIR --tokenizer DIR       one GPU of 80 GB; the same line again goes on
#     bash bench/gpu_day.sh --shape tiny --device cpu          a rehearsal on a CPU
#     bash bench/gpu_day.sh --table                            only the table of what there is so far
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/gpu_day.py" "$@"
