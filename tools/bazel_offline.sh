#!/usr/bin/env bash
# Runs Bazel on BUILD without a network, with Debian's `bazel-bootstrap` (4.2.3):
#
#   tools/bazel_offline.sh build //...
#   tools/bazel_offline.sh test //:build_test
#
# That release has the Python rules built in and reads no MODULE.bazel. So it is
# run in a scratch workspace of links to this repository, beside a stand-in for
# the repositories that it would fetch. Tests run with the `python3` on PATH,
# which has to have TensorFlow and Keras.
set -euo pipefail

if (($# == 0)); then
  echo "Usage: tools/bazel_offline.sh build|test|... [options] //..." >&2
  exit 2
fi

repository=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
# Bazel takes the right to write from what it made.
trap 'chmod -R u+w "$scratch" && rm -rf "$scratch"' EXIT

# One stand-in, under the name of each repository that Bazel looks for.
stand_in=$scratch/stand_in
mkdir -p "$stand_in"/{python,cc,java}
touch "$stand_in"/{WORKSPACE,python/BUILD,cc/BUILD,java/BUILD}
for rule in py_binary py_library py_test; do
  echo "$rule = native.$rule" >>"$stand_in/python/defs.bzl"
done
for rule in cc_binary cc_library cc_test cc_toolchain cc_toolchain_suite; do
  echo "$rule = native.$rule" >>"$stand_in/cc/defs.bzl"
done
for rule in java_import java_runtime java_toolchain; do
  echo "$rule = native.$rule" >>"$stand_in/java/defs.bzl"
done
# Every test depends on these two, which only `bazel coverage` runs.
for target in coverage_report_generator lcov_merger; do
  echo "filegroup(name = '$target', visibility = ['//visibility:public'])"
done >"$stand_in/BUILD"

workspace=$scratch/workspace
mkdir "$workspace"
for entry in "$repository"/*; do
  case $(basename "$entry") in
    bazel-* | MODULE.bazel | WORKSPACE*) ;;
    *) ln -s "$entry" "$workspace" ;;
  esac
done
for name in rules_python rules_cc rules_java remote_coverage_tools; do
  echo "local_repository(name = '$name', path = '$stand_in')"
done >"$workspace/WORKSPACE"
cat >"$workspace/.bazelrc" <<EOF
build --noshow_progress --nosandbox_debug --symlink_prefix=/
test --test_output=errors
test --test_env="PATH=$PATH"
EOF

cd "$workspace"
# A batch leaves no server behind.
"${BAZEL:-bazel}" --batch --output_user_root="$scratch/output" "$@"
