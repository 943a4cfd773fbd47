#!/usr/bin/env bash
# speechjax.main on a Cloud TPU slice, driven from here; made by python -m speechjax.launch tpu-vm.
# It waits for the slice, installs the last commit of the checkout on every host, and runs the job until it ends with
# another code than 42; then it ends with that code.
set -euo pipefail
name={{name}}
root={{root}}
restarts={{restarts}}
keep={{keep}}
where=({{where}})
asked=({{asked}})
created=false

note() { echo "launch: $*" >&2; }
resource() { gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
on_all_hosts() { gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }
to_all_hosts() { gcloud compute tpus tpu-vm scp "$1" "$name:$2" "${where[@]}" --worker=all; }

# ACTIVE, FAILED, SUSPENDED, ... or nothing where there is no such queued resource.
state() {
    gcloud compute tpus queued-resources list "${where[@]}" --filter="name~/$name\$" --format='value(state.state)'
}

remove() { resource delete --force --quiet && created=false; }

wait_for_slice() {
    local now before=
    while true; do
        now=$(state)
        [[ $now == "$before" ]] || note "slice $name: ${now:-not there, asking for it}"
        before=$now
        case $now in
            ACTIVE) return ;;
            FAILED)
                resource describe >&2
                return 1
                ;;
            SUSPENDED) remove ;;  # a spot slice that was taken away
            '')
                resource create "--node-id=$name" "${asked[@]}"
                created=true
                ;;
            *) sleep "${LAUNCH_POLL_SECONDS:-30}" ;;
        esac
    done
}

interrupted() {
    note "interrupted: stopping the job"
    on_all_hosts 'kill -TERM "$(<pid)"' || true
    exit 1
}

files=$(mktemp -d)
finish() {
    rm -rf "$files"
    $created || return 0
    note "the slice is there, and costs: gcloud compute tpus queued-resources delete $name ${where[*]} --force"
}
trap finish EXIT
trap interrupted INT TERM
git -C "$root" archive --format=tar.gz --output="$files/speechjax.tar.gz" HEAD
cat >"$files/install.bash" <<'END_OF_INSTALL'
set -e
cd
{{setup}}
mkdir -p speechjax
tar -xzf speechjax.tar.gz -C speechjax
cd speechjax
{{install}}
END_OF_INSTALL
cat >"$files/job.bash" <<'END_OF_JOB'
cd ~/speechjax || exit
main=(
    {{main}}
)
# What a lost connection left behind would still hold the chips.
if [[ -s ~/pid ]] && grep -qs speechjax.main "/proc/$(<~/pid)/cmdline"; then
    kill -KILL "$(<~/pid)"
    sleep 5
fi
"${main[@]}" &
echo "$!" >~/pid
code=0
wait "$!" || code=$?
echo "$code" >~/exit_code
exit "$code"
END_OF_JOB

# Code of the job on all hosts: an error of one of them is not hidden by the others' "restart me".
run() {
    local code=0 each
    on_all_hosts 'rm -f exit_code && bash job.bash' || code=$?
    ((code)) || return 0
    for each in $(on_all_hosts 'cat exit_code' || true); do
        if ((each != 0 && each != 42 && each < 128)); then return "$each"; fi
    done
    return 42
}

code=42
for ((start = 0; start <= restarts && code == 42; start++)); do
    ((start == 0)) || note "restart $start of $restarts"
    wait_for_slice
    code=0
    { to_all_hosts "$files/speechjax.tar.gz" speechjax.tar.gz && to_all_hosts "$files/install.bash" install.bash &&
        to_all_hosts "$files/job.bash" job.bash && on_all_hosts 'bash install.bash'; } || code=$?
    if ((code)); then
        # A slice that is taken away meanwhile is worth another try, a broken installation is not.
        [[ $(state) == ACTIVE ]] || code=42
        continue
    fi
    run || code=$?
done
note "the job ended with code $code"
if $created && ! $keep; then remove; fi
exit "$code"
