#!/usr/bin/env bash
# A run on all hosts of a TPU slice, through gcloud:
#
#   TPU=my-v5p ZONE=us-east5-a launch/tpu_vm.sh -m gakd_jax.main \
#     --config=configs/gakd.py --workdir=/mnt/shared/runs/gakd
#
# The hosts find each other. --workdir lies on a file system that all share, as
# Filestore. SETUP (default below) is run first on each. Ctrl-C saves and stops
# all; after a failure, up to RESTARTS times (default 3), all start again.
# A slice that was preempted has to be made anew; then this goes on.
set -euo pipefail

if (($# == 0)) || [[ -z ${TPU:-} || -z ${ZONE:-} ]]; then
  echo "usage: TPU=NAME ZONE=ZONE $0 -m gakd_jax.main --config=FILE --workdir=DIR" >&2
  exit 2
fi
folder=${FOLDER:-gakd_jax} # On the hosts, where the source is.
setup=${SETUP:-"pip install -q -e '.[tpu]'"}
restarts=${RESTARTS:-3}

on_all() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    ${PROJECT:+--project="$PROJECT"} --command="$1"
}

stopped=false
stop() {
  stopped=true
  on_all "kill -TERM \$(cat $folder/run.pid)" || true
}

arguments=$(printf ' %q' "$@")
trap stop INT TERM

on_all "cd $folder && $setup"
for ((attempt = 0; ; attempt++)); do
  status=0
  on_all "cd $folder && echo \$\$ >run.pid && exec python3$arguments" &
  running=$!
  while kill -0 "$running" 2>/dev/null; do
    status=0
    wait "$running" || status=$?
  done
  if ((status == 0 || status == 2 || attempt >= restarts)) || $stopped; then
    exit "$status"
  fi
  echo "exit $status: starting again, $((attempt + 1)) of $restarts" >&2
done
