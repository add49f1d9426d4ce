#!/bin/bash
# bash benchmarks/gpu/check.sh: see check.py, which has the options.
exec "${PYTHON:-python3}" "$(dirname "$0")/check.py" "$@"
