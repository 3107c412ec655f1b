#!/usr/bin/env bash
# Tests everything, and what takes too long for `.ci/run` as well: 1,000 random
# runs instead of 20, more combinations, limits and workers, 60 processes of 300
# fits that drop iterators, the micro-batches of all of Keras's tests that train,
# and each other Python that is on PATH. Takes two or three hours, in an
# environment with `.[keras-tests]`.
set -euo pipefail

cd "$(dirname "$0")/.."
export KERAS_ACCUM_NIGHTLY=1
python -m pytest -n 2 -m "" "$@"
for size in 1 3; do
  KERAS_ACCUM_MICROBATCH_SIZE=$size python -m pytest \
    -c conformance/pytest.ini -n 2 \
    keras.src.callbacks keras.src.trainers.trainer_test
done

# The newest Keras and TensorFlow on these, with the wheel and nothing else of ours.
for python in python3.12 python3.13; do
  if ! $python -c "import ensurepip" 2>/dev/null; then
    echo "Skipped: $python, which is not on PATH or lacks ensurepip."
    continue
  fi
  rm -rf ".venv_$python"
  $python -m venv ".venv_$python"
  ".venv_$python/bin/python" -m pip install . pytest pytest-xdist
  (cd tests && "../.venv_$python/bin/python" every_name.py)
  ".venv_$python/bin/python" -m pytest -n 2 tests/accumulation_test.py \
    tests/checkpoint_test.py tests/compat_hooks_test.py tests/compat_test.py \
    tests/dry_run_test.py tests/microbatch_size_test.py tests/model_test.py \
    tests/private_names_test.py tests/saving_test.py tests/schedules_test.py
done
