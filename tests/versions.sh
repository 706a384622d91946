#!/usr/bin/env bash
# Runs tests in a new environment with other versions than the pinned ones, and without constraints of ours:
#   tests/versions.sh lowest EXTRA TEST...   each dependency at the lower bound of pyproject.toml, all at once
#   tests/versions.sh newest EXTRA TEST...   what a plain `pip install` gives today
# The environment lies in a temporary folder, 6 GB with a torch for CUDA, and is deleted at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
end=$1 extra=$2
shift 2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$folder/bin/python
"${PYTHON:-python3}" -m venv "$folder"
if [ "$end" = lowest ]; then
  # What our dependencies need in turn stays as of the day on which the bounds were tried: later ones need more.
  "$python" -m pip install --quiet uv
  "$folder/bin/uv" pip install --quiet --python "$python" --resolution lowest-direct --exclude-newer 2026-11-28 \
    --editable ".[$extra]"
  "$python" tests/lower_bounds.py "$extra"
else
  "$python" -m pip install --quiet --no-compile --editable ".[$extra]"
fi
"$python" -c "
import sys
from importlib.metadata import version
print('$end:', 'python', sys.version.split()[0], *(f'{name} {version(name)}' for name in ('torch', 'torchvision', 'timm', 'numpy')))"
OMP_NUM_THREADS=1 "$python" -m pytest -p no:cacheprovider "$@"
