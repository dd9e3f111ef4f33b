#!/usr/bin/env bash
# Makes the project's own environment, or leaves it alone when it is up to date:
#   launch/environment.sh VENV [PYTHON] [EXTRAS]
# PYTHON is a command or a path; empty: the nearest Python >= 3.11. EXTRAS is a list such as
# "dev,torch"; empty: "dev", with "gpu" or "tpu" added where the machine has one.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 python=${2:-} extras=${3:-}

works() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# A pyenv shim exists for versions that are installed but not switched on: look behind it too.
find_python() {
  local name candidate
  for name in ${python:-python3 python3.11 python3.12 python3.13 python3.14}; do
    for candidate in "$name" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"${name##*/}"; do
      if works "$candidate"; then  # an active environment may be the one to be replaced: its base
        "$candidate" -c 'import sys; print(sys._base_executable)'; return
      fi
    done
  done
  echo "No Python >= 3.11 was found as ${python:-python3, python3.11 … python3.14}: install one" \
    "(with its venv module), or name it with make PYTHON=/path/to/python3." >&2
  exit 78
}

has_tpu() {  # PCI ids of TPU v2 … 7x; Google's network card has the same vendor
  local device
  for device in /sys/bus/pci/devices/*; do
    [ -e "$device/vendor" ] && [ "$(cat "$device/vendor")" = 0x1ae0 ] || continue
    case $(cat "$device/device") in 0x0027|0x0056|0x005e|0x0062|0x0063|0x006f|0x0076) return 0;; esac
  done
  return 1
}

python=$(find_python)
if [ -z "$extras" ]; then
  extras=dev
  if nvidia-smi -L >/dev/null 2>&1; then extras=dev,gpu; elif has_tpu; then extras=dev,tpu; fi
fi

base="$("$python" -c 'import sys; print(sys.version.split()[0], sys.base_prefix)') $PWD"
wanted="$base $extras $(cat pyproject.toml requirements.txt launch/environment.sh | cksum)"
[ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted" ] && exit 0

if [ "$(cat "$venv/.base" 2>/dev/null)" != "$base" ]; then
  echo "Making $venv with $("$python" --version) ($python)"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  echo "$base" > "$venv/.base"
fi
rm -f "$venv/.installed"
echo "Installing internvl-jax[$extras] and what it needs into $venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" --editable ".[$extras]"

# PyTorch only checks what was exported. Take it where a CPU build can be had, never gigabytes of
# CUDA; without it those checks are skipped.
if ! "$venv/bin/python" -c 'import torch' >/dev/null 2>&1; then
  cpu="torch==2.13.0+cpu"
  [ "$(uname)" = Darwin ] && cpu="torch==2.13.0"
  if "${pip[@]}" --retries 0 --timeout 30 --extra-index-url https://download.pytorch.org/whl/cpu \
      "$cpu" >/dev/null 2>&1 && "${pip[@]}" --editable ".[$extras,torch]"; then
    echo "PyTorch (CPU) is there: exports are checked against the original classes."
  else
    echo "No CPU build of PyTorch 2.13 is to be had here for this Python: checks against PyTorch" \
      "are skipped; to have them, install one with $venv/bin/python -m pip install '.[torch]'."
  fi
fi
echo "$wanted" > "$venv/.installed"
