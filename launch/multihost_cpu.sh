#!/usr/bin/env bash
# Runs the main command in N processes on this machine, joined over loopback: a small pod.
#
#   launch/multihost_cpu.sh N [--dry-run] [--logs DIR] MAIN'S ARGUMENTS ...
#
#   launch/multihost_cpu.sh 2 --config=configs/tiny.py --config.num_steps=3
#
# Each process is a CPU device of its own. Output goes to the terminal with its rank in front, and to DIR/<rank>.log.
# When a process dies, its rank is named and the others are ended. Exit code: 0 when all ended well, 75 when they were
# stopped by a signal with their state saved (start the same command again), else the code of the one that died.
# PYTHON names the interpreter (default: .venv/bin/python, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,/^set -/p' "launch/multihost_cpu.sh" | sed '$d; s/^# \{0,1\}//'
}

dry_run=0
logs=""
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then
  usage
  exit 0
fi
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "multihost_cpu.sh: the first argument is the number of processes (try --help)" >&2
  exit 2
fi
count="$1"
shift
while (($# > 0)); do
  case "$1" in
    --dry-run) dry_run=1 && shift ;;
    --logs)
      [[ $# -ge 2 ]] || { echo "multihost_cpu.sh: --logs needs a folder" >&2 && exit 2; }
      logs="$2" && shift 2
      ;;
    *) break ;;
  esac
done

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python3
  if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
fi
port=""
for ((try = 0; try < 50; try++)); do # a port that nothing listens on
  candidate=$((20000 + RANDOM % 20000))
  if ! (exec 3<> "/dev/tcp/127.0.0.1/$candidate") 2> /dev/null; then
    port="$candidate"
    break
  fi
done
export OMNIOPD_COORDINATOR="127.0.0.1:$port" OMNIOPD_NUM_PROCESSES="$count" JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ((dry_run)); then
  for ((rank = 0; rank < count; rank++)); do
    printf 'OMNIOPD_COORDINATOR=%q OMNIOPD_NUM_PROCESSES=%q OMNIOPD_PROCESS_ID=%q JAX_PLATFORMS=cpu ' \
      "$OMNIOPD_COORDINATOR" "$count" "$rank"
    printf '%q ' "$python" -m omniopd_jax.main "$@"
    printf '\n'
  done
  exit 0
fi

with_us=() # where this script itself is killed, its processes must not be left behind
if command -v setpriv > /dev/null; then with_us=(setpriv --pdeathsig KILL); fi
if [[ -z "$logs" ]]; then logs="$(mktemp -d)"; fi
mkdir -p "$logs"
pids=()
running=()
for ((rank = 0; rank < count; rank++)); do
  OMNIOPD_PROCESS_ID="$rank" ${with_us[@]+"${with_us[@]}"} "$python" -u -m omniopd_jax.main "$@" \
    > >(tee "$logs/$rank.log" | sed -u "s/^/[$rank] /") 2>&1 &
  pids[rank]=$!
  running[rank]=1
  echo "multihost_cpu.sh: process $rank is pid $!"
done
echo "multihost_cpu.sh: logs in $logs"

signalled=0
stop() { # passes a signal on once; the processes save and end by themselves
  signalled=1
  for rank in "${!running[@]}"; do kill -TERM "${pids[rank]}" 2> /dev/null || true; done
}
trap stop TERM INT

end_rest() { # a dead peer leaves the others in a collective: ask, then do not ask
  for rank in "${!running[@]}"; do kill -TERM "${pids[rank]}" 2> /dev/null || true; done
  for ((i = 0; i < 50; i++)); do
    local alive=0
    for rank in "${!running[@]}"; do
      if kill -0 "${pids[rank]}" 2> /dev/null; then alive=1; fi
    done
    if ((!alive)); then return; fi
    sleep 0.1
  done
  for rank in "${!running[@]}"; do kill -KILL "${pids[rank]}" 2> /dev/null || true; done
}

code=0
while ((${#running[@]} > 0)); do
  waiting=()
  for rank in "${!running[@]}"; do waiting+=("${pids[rank]}"); done
  got=0
  ended=""
  wait -n -p ended "${waiting[@]}" || got=$?
  if [[ -z "$ended" ]]; then continue; fi # a signal came in between
  for rank in "${!running[@]}"; do
    if [[ "${pids[rank]}" == "$ended" ]]; then break; fi
  done
  unset "running[$rank]"
  if ((got == 75)); then
    code=75
    if ((!signalled)); then stop; fi
  elif ((got != 0)); then
    what="exit code $got"
    if ((got > 128)); then what="signal $((got - 128))"; fi
    echo "multihost_cpu.sh: process $rank (pid $ended) is dead: $what; ending the other ${#running[@]}" >&2
    end_rest
    wait || true
    sleep 0.2 # the rest of the output
    exit "$got"
  fi
done
sleep 0.2
exit "$code"
