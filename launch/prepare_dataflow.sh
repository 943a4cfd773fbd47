#!/usr/bin/env bash
# Prepares a corpus on Dataflow, from storage to storage, with workers made from this checkout.
#   launch/prepare_dataflow.sh PROJECT REGION IMAGE SOURCE OUT [FLAGS FOR BEAM...]
#   launch/prepare_dataflow.sh my-project europe-west4 europe-west4-docker.pkg.dev/my-project/speech/prepare \
#       folder:gs://my-bucket/speech gs://my-bucket/prepared --max_num_workers=200
# IMAGE is built and pushed.  Training reads from a local disk: copy the set there when it is whole.
set -euo pipefail
if [[ $# -lt 5 ]]; then
    sed -n '2,6p' "$0" >&2
    exit 1
fi
project=$1 region=$2 image=$3 source=$4 out=$5
shift 5
cd "$(dirname "$0")/.."

if [[ ! -x .venv-beam/bin/python ]]; then
    python3.11 -m venv .venv-beam
fi
beam=$(grep '^apache-beam' launch/beam_requirements.txt)
.venv-beam/bin/pip install --quiet -r launch/beam_requirements.txt "${beam/apache-beam/apache-beam[gcp]}"
docker build --quiet -f launch/beam.Dockerfile -t "$image" .
docker push --quiet "$image"
# Stopping this script stops the job; the same command goes on from the shards that are whole.
PYTHONPATH=. exec .venv-beam/bin/python -m speechjax.prepare "--source=$source" "--out=$out" --runner=DataflowRunner -- \
    "--project=$project" "--region=$region" "--temp_location=$out/.temp" "--staging_location=$out/.staging" \
    "--sdk_container_image=$image" --experiments=use_runner_v2 "$@"
