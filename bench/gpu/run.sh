#!/usr/bin/env bash
# One command for a machine with a GPU: build, test, sanitize, measure. Needs no network.
#
#   bench/gpu/run.sh                    every part, within nine minutes, what is worth most first
#   bench/gpu/run.sh build bench        these parts alone
#   bench/gpu/run.sh list               the parts and their time limits
#
# Results go to $OUT, or to bench/results/gpu-<name of the device>: summary.json (how each part ended), log.txt (what they printed),
# machine.json, gpu.json (times), soak.json, gpu-verified.json. A part that fails or runs out of time does not stop the next ones; the exit
# status is 1 if any did not end well.
#
# Variables:
#   PYTHON      the Python that has torch             [python3]
#   OUT         folder for the results                [bench/results/gpu-<device>]
#   LIMIT       seconds for everything                [540; 1800 for a rehearsal, whose parts may take three times as long]
#   REHEARSE    1: the same parts on the CPU, tiny sizes, nothing measured; 0: a GPU or nothing    [1 where torch finds no GPU]
#   GPU_PARTS   another script that knows the parts   [parts.sh next to this one]
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cd "$root" || exit 2

export PYTHON=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Nothing may be timed under the name of a kernel that was replaced because it failed its check.
export PYTHONWARNINGS="error:ldmi_fast does not use a kernel:UserWarning"
parts_script=${GPU_PARTS:-$here/parts.sh}
least=10 # no part is started with fewer seconds left than this

usage() {
  sed -n '2,/^set /p' "$here/run.sh" | sed '$d; s/^# \{0,1\}//'
}

declare -A limit_of=()
known=() wanted=()
while read -r name seconds default; do
  known+=("$name")
  limit_of[$name]=$seconds
  if [ "$default" = default ]; then wanted+=("$name"); fi
done < <(bash "$parts_script" list)
if [ "${#known[@]}" -eq 0 ]; then
  echo "error: $parts_script lists no parts" >&2
  exit 2
fi

if [ "$#" -gt 0 ]; then
  case "$1" in
    -h | --help | help) usage; exit 0 ;;
    list) bash "$parts_script" list; exit 0 ;;
  esac
  for name in "$@"; do
    if [ -z "${limit_of[$name]:-}" ]; then
      echo "error: no part '$name': expected some of ${known[*]}" >&2
      exit 2
    fi
  done
  wanted=("$@")
fi
if ! command -v "$PYTHON" > /dev/null; then
  echo "error: there is no $PYTHON: name a Python that has torch, PYTHON=..." >&2
  exit 2
fi
if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
  echo "error: $PYTHON has no torch: name a Python that has, PYTHON=..." >&2
  exit 2
fi
case "${LIMIT:-0}" in
  *[!0-9]*) echo "error: LIMIT must be a number of seconds, got '$LIMIT'" >&2; exit 2 ;;
esac

SECONDS=0 # bash counts from here
if [ -z "${REHEARSE:-}" ]; then
  REHEARSE=1
  if command -v nvidia-smi > /dev/null &&
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
    REHEARSE=0
  fi
fi
export REHEARSE
kind=gpu patience=1
if [ "$REHEARSE" = 1 ]; then
  kind=rehearsal patience=3
  echo "== no GPU is used: a rehearsal on the CPU, whose times mean nothing"
fi
LIMIT=${LIMIT:-$((patience == 1 ? 540 : 1800))}

verified_at=
if [ -z "${OUT:-}" ]; then
  if [ "$REHEARSE" = 1 ]; then
    OUT=$root/build/gpu-rehearsal
  else
    device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-')
    OUT=$root/bench/results/gpu-${device%-}
    verified_at=$root/bench/results/gpu-verified.json
  fi
fi
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
export OUT
verified_at=${verified_at:-$OUT/gpu-verified.json}

scratch=$(mktemp -d)
pid=
clean_up() {
  if [ -n "$pid" ]; then kill "$pid" 2> /dev/null; fi
  rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT TERM
: > "$OUT/log.txt"
: > "$scratch/parts"

say() { echo "$@" | tee -a "$OUT/log.txt"; }

last_line() {
  tail -n 100 "$1" | tr -d '\000-\010\013-\037' | tr '\t' ' ' | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c 1-300
}

declare -A outcome_of=()
record() { # part outcome status seconds limit last_line
  outcome_of[$1]=$2
  printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$@" >> "$scratch/parts"
  # After each part, so that a run that is killed leaves what it did.
  "$PYTHON" "$here/summary.py" "$scratch/parts" "$OUT" "$kind" > "$scratch/table" || echo "error: no summary" >&2
}

for part in "${wanted[@]}"; do
  left=$((LIMIT - SECONDS))
  limit=$((limit_of[$part] * patience))
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  if [ "$left" -lt "$least" ]; then
    say "== $part: no time left"
    record "$part" "no time" 0 0 "${limit_of[$part]}" "not started: $left s left of $LIMIT"
    continue
  fi
  say "== $part: at most $limit s"
  start=$SECONDS
  log=$scratch/$part.log
  : > "$log"
  # To a file, not through a pipe: a process that a part leaves behind would hold a pipe open.
  PART_SECONDS=$limit timeout --kill-after=10 "$limit" bash "$parts_script" "$part" > "$log" 2>&1 < /dev/null &
  pid=$!
  tail -n +1 -s 0.2 --pid="$pid" -f "$log" 2> /dev/null | tee -a "$OUT/log.txt" &
  shown=$!
  wait "$pid" # in the foreground, so that an interrupt is heard at once
  status=$?
  wait "$shown"
  pid=
  case $status in
    0) outcome=ok ;;
    124 | 137) outcome='timed out' ;;
    *) outcome=failed ;;
  esac
  say "== $part: $outcome after $((SECONDS - start)) s"
  record "$part" "$outcome" "$status" "$((SECONDS - start))" "$limit" "$(last_line "$log")"
done

if [ "$REHEARSE" != 1 ] && [ "${outcome_of[tests]:-}" = ok ] && [ "${outcome_of[sanitize]:-}" = ok ]; then
  engines=(cuda)
  if [ "${outcome_of[triton]:-}" = ok ]; then engines+=(triton); fi
  say "$("$PYTHON" -m bench.gpu.verified --write "$verified_at" --engines "${engines[@]}" 2>&1)"
fi

tee -a "$OUT/log.txt" < "$scratch/table"
echo "results: $OUT"
for part in "${wanted[@]}"; do
  if [ "${outcome_of[$part]}" != ok ]; then exit 1; fi
done
