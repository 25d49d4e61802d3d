#!/usr/bin/env bash
# Runs the main command on this TPU host, with the flags and folders that it needs.
#
#   launch/tpu_vm.sh [--setup] [--pod] [--tries N] [--cache DIR] [--dry-run] [--] MAIN'S ARGUMENTS ...
#
#   launch/tpu_vm.sh --setup -- --config=configs/math.py --config.teacher.base_url=http://HOST:8000/v1
#
# --setup   makes .venv with requirements-tpu.txt first (Python 3.11, which uv fetches); without arguments, only that
# --pod     this host is one of several of a slice: JAX finds the others (launch/tpu_pod.sh passes it)
# --tries   how often a run that ends with code 75 (stopped by a signal, its state saved) is restarted; default 20
# --cache   folder of compiled programs; default ~/.cache/omniopd_jax/xla
# On SIGTERM, which a preemption sends, the run saves and the script ends with 75.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

setup=0 pod=0 tries=20 dry_run=0
cache="$HOME/.cache/omniopd_jax/xla"
while (($# > 0)); do
  case "$1" in
    --setup) setup=1 ;;
    --pod) pod=1 ;;
    --dry-run) dry_run=1 ;;
    --tries | --cache)
      if (($# < 2)); then echo "tpu_vm.sh: $1 needs a value" >&2 && exit 2; fi
      if [[ "$1" == --tries ]]; then whole_number "$1" "$2" && tries="$2"; else cache="$2"; fi
      shift
      ;;
    -h | --help) help_of launch/tpu_vm.sh && exit 0 ;;
    --) shift && break ;;
    --config*) break ;;
    *) echo "tpu_vm.sh: unknown argument: $1 (try --help)" >&2 && exit 2 ;;
  esac
  shift
done

settings=(
  JAX_PLATFORMS=tpu # a host whose chips do not answer must fail, not train on its CPU
  JAX_COMPILATION_CACHE_DIR="$cache"
  TF_CPP_MIN_LOG_LEVEL=2
  # overlap the gathers of FSDP with compute
  LIBTPU_INIT_ARGS="--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_overlap_compute_collective_tc=true"
)
if ((pod)); then settings+=(OMNIOPD_DISTRIBUTED=1); fi
install=(bash -c "python3 -m pip install -q --user uv==0.13.9 && python3 -m uv venv -q --allow-existing --python 3.11 .venv && python3 -m uv pip install -q --python .venv/bin/python -r requirements-tpu.txt")
command=(env "${settings[@]}" .venv/bin/python -u -m omniopd_jax.main "$@")

if ((dry_run)); then
  if ((setup)); then show "${install[@]}"; fi
  if ((!setup || $# > 0)); then show "${command[@]}"; fi
  exit 0
fi
if ((setup)); then
  "${install[@]}"
  if (($# == 0)); then exit 0; fi
fi
mkdir -p "$cache"
run_again "$tries" "${command[@]}"
