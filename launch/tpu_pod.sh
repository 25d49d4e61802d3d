#!/usr/bin/env bash
# Creates a TPU slice of several hosts, runs a job on it and deletes it, through gcloud's queued resources.
#
#   launch/tpu_pod.sh ACTION --name NAME --zone ZONE [OPTIONS] [-- MAIN'S ARGUMENTS ...]
#
# Actions, in the order in which `all` does them:
#   create   requests the slice and waits until it is ready        --type v5litepod-16 --version v2-alpha-tpuv5-lite
#            v5p: --type v5p-128 --version v2-alpha-tpuv5; v6e: --type v6e-16 --version v2-alpha-tpuv6e
#   copy     copies this repository (the files that git tracks) to every host
#   setup    on every host: mounts the shared folder, installs requirements-tpu.txt
#   run      on every host: launch/tpu_vm.sh --pod -- MAIN'S ARGUMENTS; shows its output and ends when the job does.
#            The job does not end when the connection breaks: `follow` shows it again
#   logs     fetches job.log of every host into ./pod-logs/NAME
#   delete   deletes the slice (`all` does it at the end in any case)
# Options:
#   --project P    gcloud's default where it is missing
#   --spot         cheaper, and may be preempted at any time: the slice is then requested again, and the run resumes
#                  from its checkpoint (at most --tries times, default 20)
#   --mount SOURCE a file system that all hosts share, for run_dir: HOST:/SHARE (NFS, Filestore) or gs://BUCKET (gcsfuse);
#                  it appears as /mnt/omniopd: --config.run_dir=/mnt/omniopd/NAME
#   --env VAR      passes a variable of this shell (a teacher's key) to the run, in a file that only it reads; may be repeated
#   --dry-run      prints the commands
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

action="${1:-}"
case "$action" in
  all | create | copy | setup | run | follow | logs | delete) shift ;;
  -h | --help) help_of launch/tpu_pod.sh && exit 0 ;;
  *) echo "tpu_pod.sh: the first argument is an action: all create copy setup run follow logs delete (try --help)" >&2 && exit 2 ;;
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
        --tries) whole_number "$1" "$2" && tries="$2" ;;
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
if [[ "$action" == all || "$action" == run ]]; then # before anything is asked for and paid
  for key in ${keys[@]+"${keys[@]}"}; do
    if ! [[ "$key" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]]; then
      echo "tpu_pod.sh: --env $key: the name of a variable is needed" >&2 && exit 2
    fi
    if [[ -z "${!key+set}" ]]; then
      echo "tpu_pod.sh: --env $key: this shell has no such variable: export $key=... first" >&2 && exit 2
    fi
  done
fi
key_file="" # holds the keys while they are copied
trap 'rm -f "$key_file"' EXIT

where=(--zone "$zone")
if [[ -n "$project" ]]; then where+=(--project "$project"); fi
tpus=(gcloud compute tpus)

do_() { # runs a command, or prints it
  if ((dry_run)); then show "$@"; else "$@"; fi
}

on_all() { # a command on every host
  do_ "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command "$1"
}

to_all() { # a file to every host's home
  do_ "${tpus[@]}" tpu-vm scp "$1" "$name:$2" "${where[@]}" --worker=all
}

state() { # GONE where gcloud says that there is none, UNKNOWN where it does not answer
  local said
  if said="$("${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>&1)"; then
    echo "${said##*$'\n'}"
  elif [[ "$said" =~ NOT_FOUND|"not found" ]]; then
    echo GONE
  else
    echo UNKNOWN
  fi
}

may_be_active() {
  [[ "$(state)" =~ ^(ACTIVE|UNKNOWN)$ ]]
}

# Below, every step says `|| return`: where a function stands in a condition, bash does not stop at its errors.

request() {
  local kind=()
  if ((spot)); then kind+=(--spot); fi
  do_ "${tpus[@]}" queued-resources create "$name" "${where[@]}" --node-id "$name" --accelerator-type "$type" \
    --runtime-version "$version" ${kind[@]+"${kind[@]}"}
}

create() {
  local now="" asked=0
  if ((dry_run)); then
    request
    echo "# until its state is ACTIVE:"
    show "${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
    return
  fi
  while :; do
    now="$(state)"
    if [[ "$now" == GONE ]] && ((!asked)); then
      asked=1
      request || return
      now="$(state)"
    fi
    echo "tpu_pod.sh: $name is $now"
    case "$now" in
      ACTIVE) return ;;
      FAILED | GONE | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    sleep 30
  done
}

copy() {
  if ((!dry_run)) && [[ -n "$(git status --porcelain)" ]]; then echo "tpu_pod.sh: what is not committed is not copied" >&2; fi
  do_ git archive --format=tar.gz -o "/tmp/$name.tar.gz" HEAD || return
  to_all "/tmp/$name.tar.gz" omniopd_jax.tar.gz || return
  on_all "mkdir -p omniopd_jax && tar -xzf omniopd_jax.tar.gz -C omniopd_jax"
}

setup() {
  local line="sudo mkdir -p /mnt/omniopd && sudo chmod 777 /mnt/omniopd"
  case "$mount" in
    "") line="true" ;;
    gs://*) # gcsfuse renames a folder that is not empty only where a limit allows it, and a checkpoint is such a folder
      line+=" && (mountpoint -q /mnt/omniopd || gcsfuse --implicit-dirs --rename-dir-limit=1000000 ${mount#gs://} /mnt/omniopd)"
      ;;
    *)
      line+=" && (command -v mount.nfs > /dev/null || (sudo apt-get -q update && sudo apt-get -qy install nfs-common))"
      line+=" && (mountpoint -q /mnt/omniopd || sudo mount -t nfs $mount /mnt/omniopd)"
      ;;
  esac
  on_all "$line && cd omniopd_jax && launch/tpu_vm.sh --setup"
}

start() { # the job goes on where the connection does not; its output and its exit code stay on the host
  local arguments inner cache=""
  printf -v arguments '%q ' "$@"
  if [[ -n "$mount" ]]; then cache="--cache /mnt/omniopd/xla "; fi # process 0 alone writes it: one folder for all hosts
  inner="launch/tpu_vm.sh --pod $cache-- $arguments; echo \$? > job.code"
  if ((${#keys[@]})); then # keys travel in a file: a command line is everyone's to read
    key_file="$(mktemp)" # only its owner may read it
    for key in "${keys[@]}"; do printf 'export %s=%q\n' "$key" "${!key}" >> "$key_file"; done
    to_all "$key_file" omniopd_jax/.job.env || { rm -f "$key_file" && return 1; }
    rm -f "$key_file"
    inner=". ./.job.env; rm -f .job.env; $inner"
  fi
  printf -v inner '%q' "$inner"
  on_all "cd omniopd_jax && rm -f job.code && (nohup setsid bash -c $inner >> job.log 2>&1 < /dev/null &)"
}

follow() { # until the job has ended everywhere: its code
  local wait="until [ -s job.code ]; do sleep 2; done; sleep 1; kill \$shown; exit \$(cat job.code)"
  on_all "cd omniopd_jax || exit 1; tail -n 5 -F job.log & shown=\$!; $wait"
}

run() {
  start "$@" || return
  follow
}

logs() {
  do_ mkdir -p "pod-logs/$name" || return
  do_ "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command "cat omniopd_jax/job.log" \
    --output-directory "pod-logs/$name"
}

delete() {
  do_ "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
}

give_back() {
  delete || echo "tpu_pod.sh: $name could not be deleted and may still cost money: launch/tpu_pod.sh delete ..." >&2
}

watch_job() { # `follow`, over connections that break: 255 is ssh's own code, 1 may be gcloud's
  local code=0
  follow || code=$?
  while { ((code == 255)) || { ((code)) && [[ "$(state)" == UNKNOWN ]]; }; } && sleep 60 && may_be_active; do
    code=0
    follow || code=$?
  done
  return "$code"
}

preempted() { # a job that ended by a notice (75): whether its slice is gone within five minutes
  local i
  for ((i = 0; i < 10; i++)); do
    may_be_active || return 0
    sleep 30
  done
  return 1
}

all() {
  local try code
  trap 'rm -f "$key_file"; give_back' EXIT # whatever happens, the slice is not left behind to be paid for
  for ((try = 0; try <= tries; try++)); do
    code=0
    { create && copy && setup && start "$@" && watch_job; } || code=$?
    if ((dry_run || code == 0 || !spot)); then break; fi
    if ((code == 75)) && ! preempted; then
      echo "tpu_pod.sh: $name is still there; starting the job again ($((try + 1)) of $tries)" >&2
      continue
    fi
    if may_be_active; then break; fi # else it was taken away
    echo "tpu_pod.sh: $name was taken away; asking for it again ($((try + 1)) of $tries)" >&2
    delete || true
  done
  logs || true
  trap - EXIT
  give_back
  return "$code"
}

"$action" "$@"
