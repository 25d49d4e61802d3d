#!/usr/bin/env bash
# Runs the main command on a node with GPUs: one process over all of them, alone or as a SLURM job of one or more nodes.
#
#   launch/gpu_node.sh [--tries N] [--cache DIR] [--dry-run] [--] MAIN'S ARGUMENTS ...
#   sbatch --nodes=2 launch/gpu_node.sh -- --config=configs/math.py
#
# Under SLURM each node is one process, which JAX joins by itself; a job that is about to be preempted or to run out of
# time gets SIGTERM two minutes before, saves, and is put back into the queue. Elsewhere a run that ends with code 75 is
# started again, at most --tries times (default 20). --cache: folder of compiled programs.
# Needs .venv with requirements-gpu.txt:
#   make .venv/.lean && .venv/bin/uv pip install --python .venv/bin/python -r requirements-gpu.txt
#SBATCH --job-name=omniopd
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
set -euo pipefail
# sbatch runs a copy of this file: the repository is where it was called
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
# shellcheck source=launch/lib.sh
source launch/lib.sh

tries=20 dry_run=0
cache="$HOME/.cache/omniopd_jax/xla"
while (($# > 0)); do
  case "$1" in
    --dry-run) dry_run=1 ;;
    --tries | --cache)
      if (($# < 2)); then echo "gpu_node.sh: $1 needs a value" >&2 && exit 2; fi
      if [[ "$1" == --tries ]]; then whole_number "$1" "$2" && tries="$2"; else cache="$2"; fi
      shift
      ;;
    -h | --help) help_of launch/gpu_node.sh && exit 0 ;;
    --) shift && break ;;
    --config*) break ;;
    *) echo "gpu_node.sh: unknown argument: $1 (try --help)" >&2 && exit 2 ;;
  esac
  shift
done

settings=(
  JAX_PLATFORMS=cuda # a node whose GPUs do not answer must fail, not train on its CPU
  JAX_COMPILATION_CACHE_DIR="$cache"
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
  NCCL_DEBUG=WARN
  TF_CPP_MIN_LOG_LEVEL=2
  XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true"
)
command=(env "${settings[@]}" .venv/bin/python -u -m omniopd_jax.main "$@")
if [[ -n "${SLURM_JOB_ID:-}" ]]; then command=(srun --kill-on-bad-exit=1 "${command[@]}"); fi

if ((dry_run)); then
  show "${command[@]}"
  if [[ -n "${SLURM_JOB_ID:-}" ]]; then show scontrol requeue "$SLURM_JOB_ID"; fi
  exit 0
fi
mkdir -p "$cache"
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  run_again "$tries" "${command[@]}"
  exit 0
fi
code=0
run_again 0 "${command[@]}" || code=$?
if ((code == 75)); then
  echo "gpu_node.sh: the state is saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
