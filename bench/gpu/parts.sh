#!/usr/bin/env bash
# The parts of run.sh, which calls this with $PYTHON, $OUT, $REHEARSE (1: on the CPU, tiny) and $PART_SECONDS, the part's time limit.
#
#   parts.sh list        name, time limit in seconds, and `default` if it runs when none is named, in that order
#   parts.sh NAME        one part
set -euo pipefail

export LDMI_FAST_NATIVE=1

# The tests of the loss; not those that need packages which such a machine may lack, nor those of the documents.
contract=()
for file in tests/test_*.py; do
  case $file in tests/test_oracle.py | tests/test_docs.py) ;; *) contract+=("$file") ;; esac
done

rehearsed() { [ "$REHEARSE" = 1 ]; }

run_pytest() {
  local workers=()
  if ! rehearsed && "$PYTHON" -c 'import xdist' 2> /dev/null; then workers=(-n 10 --dist worksteal); fi
  "$PYTHON" -m pytest -q --tb=short --maxfail=40 --durations=8 --disable-warnings -p no:cacheprovider -p no:logging "${workers[@]}" "$@"
}

case "${1:-}" in
  list)
    cat << 'LIST'
build 240 default
tests 170 default
sanitize 140 default
bench 170 default
soak 60 default
triton 180 default
cpu 120 default
staged 60 optional
profile 120 optional
LIST
    ;;

  build) # in place, for this machine's own GPU
    if rehearsed; then export LDMI_FAST_CUDA=${LDMI_FAST_CUDA:-0}; else export LDMI_FAST_CUDA=1; fi
    status=0
    "$PYTHON" setup.py -q build_ext --inplace || status=$?
    "$PYTHON" -m bench.gpu.machine --out "$OUT/machine.json" || status=1 # worth knowing after a failure too
    "$PYTHON" -m ldmi_fast || status=1
    if [ "$status" -eq 0 ]; then echo "built: $(ls ldmi_fast/_C*.so)"; else echo 'the build FAILED'; fi
    exit "$status"
    ;;

  tests) # the contract on the GPU, by every engine but Triton's, and what only a GPU can be asked
    if rehearsed; then
      run_pytest tests/gpu tests/test_modules.py tests/test_published.py
    else
      run_pytest tests/gpu "${contract[@]}" tests/engines -k '(gpu or cuda) and not triton'
    fi
    ;;

  sanitize)
    if rehearsed; then
      "$PYTHON" -m bench.gpu.sanitize --build build/gpu-simt-cpu --rehearse --cases example conformance
    else
      "$PYTHON" -m bench.gpu.sanitize --build build/gpu-simt
    fi
    ;;

  bench)
    if rehearsed; then
      "$PYTHON" -m bench.gpu --rehearse --out "$OUT/gpu.json"
    else
      "$PYTHON" -m bench.gpu --seconds "$((PART_SECONDS - 20))" --out "$OUT/gpu.json"
    fi
    ;;

  soak)
    if rehearsed; then
      "$PYTHON" -m tests.gpu.soak --problems 50 --jobs 2 --out "$OUT/soak.json"
    else
      "$PYTHON" -m tests.gpu.soak --seconds "$((PART_SECONDS - 10))" --out "$OUT/soak.json"
    fi
    ;;

  triton) # the contract by Triton's engine alone
    device=cuda
    if rehearsed; then device=cpu TRITON_INTERPRET=1; export TRITON_INTERPRET; fi
    why=$("$PYTHON" -c "
from ldmi_fast.engines.choose import available
print(available('$device').get('triton', 'this version has no engine of that name'))")
    if [ -n "$why" ]; then
      echo "the engine triton does not run here: $why"
    elif rehearsed; then
      run_pytest -p tests.engines.triton.interpreter tests/test_modules.py -k triton
    else
      run_pytest tests/gpu "${contract[@]}" -k 'triton and (gpu or cuda)'
    fi
    ;;

  cpu) # what is left of the suite
    if rehearsed; then
      run_pytest tests/test_validation.py
    else
      run_pytest "${contract[@]}" tests/engines -k 'not cuda'
    fi
    ;;

  staged) # the same shapes with the forward step by step, to compare with `bench`: csrc/plan says what is expected
    export LDMI_FAST_CUDA_STAGED=1
    if rehearsed; then
      "$PYTHON" -m bench.gpu --rehearse --out "$OUT/gpu-staged.json"
    else
      "$PYTHON" -m bench.gpu --seconds "$((PART_SECONDS - 15))" --logdet --cases 4096x14 65536x14 65536x100 1024x100 65536x32 \
        --out "$OUT/gpu-staged.json"
    fi
    ;;

  profile)
    if rehearsed; then
      "$PYTHON" -m bench.gpu.profile --rehearse | tee "$OUT/profile.txt"
      exit
    fi
    "$PYTHON" -m bench.gpu.profile | tee "$OUT/profile.txt"
    if command -v ncu > /dev/null; then
      # Clocks as they are: they are not ours to change.
      ncu --clock-control none --target-processes all --launch-skip 20 --launch-count 12 \
        --section SpeedOfLight --section LaunchStats --section Occupancy --section MemoryWorkloadAnalysis \
        "$PYTHON" -m bench.gpu.profile --loop 6 --cases 65536x100 2>&1 | tee -a "$OUT/profile.txt"
    else
      echo "ncu is missing: no hardware counters" | tee -a "$OUT/profile.txt"
    fi
    ;;

  *)
    echo "error: no part '${1:-}': parts.sh list names them" >&2
    exit 2
    ;;
esac
