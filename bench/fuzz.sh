#!/usr/bin/env bash
# Fuzzes the native entry points by libFuzzer under the address and undefined-behaviour sanitizers, and prints how many
# inputs were run. Needs clang with its runtime (Debian: clang, libclang-rt-14-dev).
#   bench/fuzz.sh [seconds, 600 by default]
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-600}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cxx=${CXX:-clang++}
flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all
  -Icsrc -ffp-contract=fast -Wno-psabi -pthread)
levels=(baseline)
if [[ $(uname -m) == x86_64 ]]; then
  levels+=(avx2 avx512)
  flags+=(-DN2N_FAST_X86)
fi
declare -A simd=([baseline]="" [avx2]="-mavx2 -mfma -mf16c"
  [avx512]="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512")
for level in "${levels[@]}"; do
  # shellcheck disable=SC2086 # several options
  "$cxx" "${flags[@]}" ${simd[$level]} -DN2N_FAST_LEVEL="$level" -c csrc/kd_loss_rows.cpp -o "$place/$level.o"
done
"$cxx" "${flags[@]}" -fsanitize=fuzzer bench/fuzz.cpp csrc/materialize.cpp csrc/kd_loss.cpp csrc/thread_pool.cpp \
  "$place"/*.o -o "$place/fuzz"
mkdir "$place/corpus"
# An input that fails is written below artifacts, to be run again with the same program.
mkdir -p build/fuzz
"$place/fuzz" -max_total_time="$seconds" -max_len=4096 -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 \
  -artifact_prefix=build/fuzz/ "$place/corpus" 2> "$place/log" || { tail -60 "$place/log"; exit 1; }
sed -n 's/^stat::number_of_executed_units: */inputs executed: /p; s/^#\([0-9]*\).*DONE *\(cov: [0-9]*\).*/\2 edges/p' "$place/log"
