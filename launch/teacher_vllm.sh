#!/usr/bin/env bash
# Serves an open model as a teacher: an OpenAI-compatible vLLM server that continues unfinished answers.
#
#   launch/teacher_vllm.sh [--model NAME] [--port N] [--tp N] [--dp N] [--max-len N] [--seqs N] [--dry-run] [-- MORE VLLM FLAGS]
#
# Then, in the recipe or on the command line:
#   teacher.provider=openai  teacher.model=NAME  teacher.base_url=http://HOST:PORT/v1  teacher.continuation=auto
# A key is asked of clients where VLLM_API_KEY is set here; they send it from OPENAI_API_KEY.
#
# Needs: pip install vllm (a CUDA or TPU build; not part of requirements.txt), and room for the weights
# (Qwen3-32B in bfloat16: 66 GB, so two GPUs of 80 GB with --tp 2). Not run in this repository's tests: see --dry-run.
set -euo pipefail

model="Qwen/Qwen3-32B"
host="0.0.0.0"
port=8000
tp=1
dp=1
max_len=10240 # student prompt 1,024 + response 7,168, the instruction and the chunk
seqs=256
dry_run=0
more=()

usage() {
  sed -n '2,/^set -/p' "$0" | sed '$d; s/^# \{0,1\}//'
}

need_value() {
  if (($# < 2)); then
    echo "teacher_vllm.sh: $1 needs a value" >&2
    exit 2
  fi
}

while (($# > 0)); do
  case "$1" in
    --model | --host | --port | --tp | --dp | --max-len | --seqs)
      need_value "$@"
      case "$1" in
        --model) model="$2" ;;
        --host) host="$2" ;;
        --port) port="$2" ;;
        --tp) tp="$2" ;;
        --dp) dp="$2" ;;
        --max-len) max_len="$2" ;;
        --seqs) seqs="$2" ;;
      esac
      shift 2
      ;;
    --dry-run)
      dry_run=1
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      more=("$@")
      break
      ;;
    *)
      echo "teacher_vllm.sh: unknown argument: $1 (try --help)" >&2
      exit 2
      ;;
  esac
done

command=(
  vllm serve "$model"
  --host "$host" --port "$port"
  --tensor-parallel-size "$tp"
  --data-parallel-size "$dp"
  --max-model-len "$max_len"
  --max-num-seqs "$seqs"
  --enable-prefix-caching     # the prefixes of one response are nested
  --generation-config vllm    # else the model's own top_p and top_k apply where a request names none
)
command+=(${more[@]+"${more[@]}"})

if ((dry_run)); then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
if ! command -v vllm > /dev/null; then
  echo "teacher_vllm.sh: vllm is not installed (pip install vllm, on a machine with an accelerator)" >&2
  exit 1
fi
exec "${command[@]}"
