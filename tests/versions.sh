#!/usr/bin/env bash
# Runs tests with other versions than the pinned ones:
#   tests/versions.sh patch TEST...          the lowest patch release of the Python of .venv, with the packages of .venv
#   tests/versions.sh lowest EXTRA TEST...   each dependency at the lower bound of pyproject.toml, all at once
#   tests/versions.sh newest EXTRA TEST...   what a plain install gives today, with the newest Python
# Of Python it takes what is installed, on PATH or by pyenv; PYTHON names another. The last two ways make an environment
# without constraints of ours, in a temporary folder, 6 GB with a torch for CUDA, which is deleted at the end. It is made by
# uv, whose files are links into its cache where that is on the same disk.
set -euo pipefail
cd "$(dirname "$0")/.."
end=$1
shift
installed() { # version and path of each Python of two digits, the oldest first
  local folders folder file version
  IFS=: read -ra folders <<< "$PATH"
  for folder in "${folders[@]}" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin; do
    for file in "$folder"/python3.[0-9][0-9]; do
      if version=$("$file" -c 'import platform; print(platform.python_version())' 2>/dev/null); then
        echo "$version $file"
      fi
    done
  done | sort -V
}
if [ "$end" = patch ]; then
  ours=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  python=${PYTHON:-$(installed | awk -v ours="$ours." 'index($1, ours) == 1 && !found++ {print $2}')}
  packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  export PYTHONPATH=$packages:$PWD/src
else
  extra=$1
  shift
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  python=$folder/bin/python
fi
install() { # of pip's options
  .venv/bin/uv pip install --quiet --python "$python" --editable ".[$extra]" "$@"
}
if [ "$end" = lowest ]; then
  "${PYTHON:-python3}" -m venv --without-pip "$folder"
  # What our dependencies need in turn stays as of the day on which the bounds were tried: later ones need more.
  install --resolution lowest-direct --exclude-newer 2026-11-28
  "$python" tests/lower_bounds.py "$extra"
elif [ "$end" = newest ]; then
  "${PYTHON:-$(installed | awk 'END {print $2}')}" -m venv --without-pip "$folder"
  install
fi
"$python" -c "
import sys
from importlib.metadata import version
print('$end:', 'python', sys.version.split()[0], *(f'{name} {version(name)}' for name in ('torch', 'torchvision', 'timm', 'numpy')))"
OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= "$python" -m pytest -p no:cacheprovider "$@"
