#!/usr/bin/env bash
# Several processes on this machine that are one run:
#
#   launch/local.sh N -m gakd_jax.main --config=configs/gakd.py [--flag=...]
#
# Each has a share of the machine's GPUs, if there are any. Ctrl-C and SIGTERM
# save and stop all. When one of them was preempted or has died, all start
# again, up to RESTARTS times (default 3), and go on from the last checkpoint.
# Logs of all but the first go to LOGS (default: a temporary directory).
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "usage: $0 N -m gakd_jax.main --config=FILE [--flag=...]" >&2
  exit 2
fi
processes=$1
shift
restarts=${RESTARTS:-3}
logs=${LOGS:-$(mktemp -d)}
python=${PYTHON:-python}
mkdir -p "$logs"

gpus=0
if command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
fi
if ((gpus % processes)); then
  echo "$gpus GPUs do not divide over $processes processes" >&2
  exit 2
fi

stopped=false
children=()
stop() {
  stopped=true
  kill -TERM "${children[@]}" 2>/dev/null || true
}
trap stop INT TERM

# The first port of two that are free, of those that nothing is given by chance.
free_port() {
  "$python" - <<'PYTHON'
import random, socket
while True:
  port = random.randrange(10_000, 30_000)
  try:
    for n in (port, port + 1):
      socket.create_server(('', n)).close()
  except OSError:
    continue
  print(port)
  break
PYTHON
}

run() { # Exit status: that of the first process that did not end well.
  local port i share status=0 each
  port=$(free_port)
  ! $stopped || return 130
  share=$((gpus / processes))
  children=()
  for ((i = 0; i < processes; i++)); do
    # A group of its own: Ctrl-C comes from `stop`, once.
    (
      if ((gpus)); then
        JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * share)) $((i * share + share - 1)))
        export JAX_LOCAL_DEVICE_IDS
      fi
      ((i)) && exec >"$logs/$i.log" 2>&1
      trap - INT TERM
      exec setsid "$python" "$@" --coordinator="localhost:$port" \
        --processes="$processes" --process_id="$i"
    ) &
    children+=($!)
  done
  ! $stopped || stop # Asked for while they began.
  for i in "${!children[@]}"; do
    while true; do # A signal that is trapped ends `wait`, not the child.
      each=0
      wait "${children[i]}" || each=$?
      kill -0 "${children[i]}" 2>/dev/null || break
    done
    ((status)) || status=$each
  done
  return "$status"
}

for ((attempt = 0; ; attempt++)); do
  status=0
  run "$@" || status=$?
  # 0: done. 2: what the user can put right, and starting again cannot.
  if ((status == 0 || status == 2 || attempt >= restarts)) || $stopped; then
    ((status == 0)) || echo "exit $status; other logs are in $logs" >&2
    exit "$status"
  fi
  echo "exit $status: starting again, $((attempt + 1)) of $restarts" >&2
done
