#!/usr/bin/env bash
# Runs a config on every host of an existing Cloud TPU VM slice, from a clean checkout of this repository.
#   launch/tpu_vm.sh NAME ZONE --config=configs/pretrain/wav2vec2.py:size=base --workdir=/mnt/shared/runs/base ...
set -euo pipefail
if [[ $# -lt 3 ]]; then
    sed -n '2,3p' "$0" >&2
    exit 1
fi
name=$1 zone=$2
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
flags=$(printf '%q ' "$@")
ssh=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all)

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$here" archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:speechjax.tar.gz" "--zone=$zone" --worker=all
"${ssh[@]}" --command="rm -rf speechjax && mkdir speechjax && tar -xzf speechjax.tar.gz -C speechjax && cd speechjax \
    && python3 -m venv .venv && .venv/bin/pip install --quiet --constraint constraints.txt --editable '.[tpu]'"
# Exit code 42 means: start me again.
until "${ssh[@]}" --command="cd speechjax && .venv/bin/python -m speechjax.main $flags"; do
    code=$?
    [[ $code -eq 42 ]] || exit "$code"
done
