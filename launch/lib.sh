# Sourced by the scripts of this folder: a command that is restarted when its exit code asks for it.
# shellcheck shell=bash

# run_again TRIES COMMAND...: runs it; exit code 75 (state saved, restart) restarts it, at most TRIES times.
# A signal to the script goes to the command, which saves and ends; then the script ends too, with 75: the machine is
# about to disappear, and the next start resumes from the checkpoint.
run_again() {
  local tries="$1" code=0 try=0
  shift
  stopped=0
  trap 'stopped=1; if [[ -n "$child" ]]; then kill -TERM "$child" 2> /dev/null || true; else missed=1; fi' TERM INT
  while :; do
    child="" missed="" # a signal before the command's number is known is passed on as soon as it is
    "$@" &
    child=$!
    if [[ -n "$missed" ]]; then kill -TERM "$child" 2> /dev/null || true; fi
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2> /dev/null; do # the first wait ended with the trap: the command is still saving
      code=0
      wait "$child" || code=$?
    done
    if ((code != 75 || stopped)); then return "$code"; fi
    try=$((try + 1))
    if ((try > tries)); then
      echo "${0##*/}: stopped $try times; giving up" >&2
      return 75
    fi
    echo "${0##*/}: the run was stopped with its state saved; starting it again ($try of $tries)" >&2
  done
}

# whole_number OPTION VALUE: ends the script where the value is none.
whole_number() {
  if ! [[ "$2" =~ ^(0|[1-9][0-9]*)$ ]]; then
    echo "${0##*/}: $1 $2: a whole number is needed, 0 or more" >&2
    exit 2
  fi
}

# show COMMAND...: one line that a shell could read back.
show() {
  printf '%q ' "$@"
  printf '\n'
}

# help_of FILE: the comment at its top.
help_of() {
  sed -n '2,/^[^#]/p' "$1" | sed '$d; s/^# \{0,1\}//'
}
