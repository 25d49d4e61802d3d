#!/usr/bin/env bash
# A TPU slice of several hosts from nothing to a running job and back, through gcloud's queued resources.
#
#   launch/tpu_pod.sh ACTION --name NAME --zone ZONE [OPTIONS] [-- MAIN'S ARGUMENTS ...]
#
# Actions, in the order in which `all` does them:
#   create   asks for the slice and waits until it is there        --type v5litepod-16 --version v2-alpha-tpuv5-lite
#   copy     copies this repository (what git knows of it) to every host
#   setup    on every host: mounts the shared folder, installs requirements-tpu.txt
#   run      on every host: launch/tpu_vm.sh --pod -- MAIN'S ARGUMENTS; ends when the job does
#   logs     fetches ~/omniopd_jax/job.log of every host into ./pod-logs/NAME
#   delete   gives the slice back (`all` does it at the end, whatever happened)
# Options:
#   --project P    gcloud's default where it is missing
#   --spot         cheaper, and taken away at any time: a slice that was preempted is asked for again, and the run goes
#                  on from its checkpoint (at most --tries times, default 20)
#   --mount SOURCE a file system that all hosts share, for run_dir: HOST:/SHARE (NFS, Filestore) or gs://BUCKET (gcsfuse);
#                  it appears as /mnt/omniopd: --config.run_dir=/mnt/omniopd/NAME
#   --env VAR      passes a variable of this shell (a teacher's key) to the run; may be repeated
#   --dry-run      prints the commands
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

action="${1:-}"
case "$action" in
  all | create | copy | setup | run | logs | delete) shift ;;
  -h | --help) help_of launch/tpu_pod.sh && exit 0 ;;
  *) echo "tpu_pod.sh: the first argument is an action: all create copy setup run logs delete (try --help)" >&2 && exit 2 ;;
esac
name="" zone="" type="v5litepod-16" version="v2-alpha-tpuv5-lite" project="" mount="" tries=20 spot=0 dry_run=0
keys=()
while (($# > 0)); do
  case "$1" in
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    --name | --zone | --type | --version | --project | --mount | --env | --tries)
      if (($# < 2)); then echo "tpu_pod.sh: $1 needs a value" >&2 && exit 2; fi
      case "$1" in
        --name) name="$2" ;;
        --zone) zone="$2" ;;
        --type) type="$2" ;;
        --version) version="$2" ;;
        --project) project="$2" ;;
        --mount) mount="$2" ;;
        --tries) tries="$2" ;;
        --env) keys+=("$2") ;;
      esac
      shift
      ;;
    --) shift && break ;;
    *) echo "tpu_pod.sh: unknown argument: $1 (try --help)" >&2 && exit 2 ;;
  esac
  shift
done
if [[ -z "$name" || -z "$zone" ]]; then echo "tpu_pod.sh: --name and --zone are needed" >&2 && exit 2; fi

where=(--zone "$zone")
if [[ -n "$project" ]]; then where+=(--project "$project"); fi
tpus=(gcloud compute tpus)

do_() { # runs a command, or prints it
  if ((dry_run)); then show "$@"; else "$@"; fi
}

on_all() { # a command on every host
  do_ "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command "$1"
}

state() {
  "${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2> /dev/null || echo GONE
}

create() {
  local kind=()
  if ((spot)); then kind+=(--spot); fi
  do_ "${tpus[@]}" queued-resources create "$name" "${where[@]}" --node-id "$name" --accelerator-type "$type" \
    --runtime-version "$version" ${kind[@]+"${kind[@]}"}
  if ((dry_run)); then
    echo "# until its state is ACTIVE:"
    show "${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
    return
  fi
  local now=""
  until [[ "$now" == ACTIVE ]]; do
    now="$(state)"
    echo "tpu_pod.sh: $name is $now"
    if [[ "$now" == FAILED || "$now" == GONE ]]; then return 1; fi
    if [[ "$now" != ACTIVE ]]; then sleep 30; fi
  done
}

copy() {
  do_ git archive --format=tar.gz -o "/tmp/$name.tar.gz" HEAD
  do_ "${tpus[@]}" tpu-vm scp "/tmp/$name.tar.gz" "$name:omniopd_jax.tar.gz" "${where[@]}" --worker=all
  on_all "mkdir -p omniopd_jax && tar -xzf omniopd_jax.tar.gz -C omniopd_jax"
}

setup() {
  local line="sudo mkdir -p /mnt/omniopd && sudo chmod 777 /mnt/omniopd"
  case "$mount" in
    "") line="true" ;;
    gs://*) line+=" && (mountpoint -q /mnt/omniopd || gcsfuse --implicit-dirs ${mount#gs://} /mnt/omniopd)" ;;
    *) line+=" && (mountpoint -q /mnt/omniopd || sudo mount -t nfs $mount /mnt/omniopd)" ;;
  esac
  on_all "$line && cd omniopd_jax && launch/tpu_vm.sh --setup"
}

run() {
  local passed="" arguments
  for key in ${keys[@]+"${keys[@]}"}; do
    if ((dry_run)); then passed+="$key=... "; else passed+="$key=$(printf '%q' "${!key}") "; fi
  done
  printf -v arguments '%q ' "$@"
  on_all "cd omniopd_jax && set -o pipefail && ${passed}launch/tpu_vm.sh --pod -- $arguments 2>&1 | tee -a job.log"
}

logs() {
  do_ mkdir -p "pod-logs/$name"
  do_ "${tpus[@]}" tpu-vm scp "$name:omniopd_jax/job.log" "pod-logs/$name/" "${where[@]}" --worker=all
}

delete() {
  do_ "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
}

all() {
  local try code
  for ((try = 0; try <= tries; try++)); do
    trap 'delete || true' EXIT # whatever happens, the slice is not left behind to be paid for
    create && copy && setup
    code=0
    run "$@" || code=$?
    if ((dry_run)); then break; fi
    if ((code == 0)); then break; fi
    if ((!spot)) || [[ "$(state)" == ACTIVE ]]; then break; fi # an error of its own, not a preemption
    echo "tpu_pod.sh: $name was taken away; asking for it again ($((try + 1)) of $tries)" >&2
    delete || true
  done
  logs || true
  trap - EXIT
  delete
  return "$code"
}

"$action" "$@"
