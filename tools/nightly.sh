#!/usr/bin/env bash
# Tests everything, and what takes too long for `.ci/run` as well: 1,000 random
# runs instead of 100, more limits, more workers, 60 processes of 300 fits that drop
# iterators, and the micro-batches of all of Keras's tests that train. Takes two or
# three hours, in an environment with `.[keras-tests]`.
set -euo pipefail

cd "$(dirname "$0")/.."
export KERAS_ACCUM_NIGHTLY=1
python -m pytest -n 2 -m "" "$@"
for size in 1 3; do
  KERAS_ACCUM_MICROBATCH_SIZE=$size python -m pytest \
    -c conformance/pytest.ini -n 2 \
    keras.src.callbacks keras.src.trainers.trainer_test
done
