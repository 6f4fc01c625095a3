#!/usr/bin/env bash
# The whole suite with another set of PyTorch, TorchRec and FBGEMM than the pinned one: those of dlrm/system/package_sets.py.
#
#   requirements/try.sh newest             environment, lists and logs in build/sets/newest (about 7 GB with CUDA's libraries)
#   requirements/try.sh oldest FOLDER      the same elsewhere; the folder belongs to this checkout alone
#
# Started again, it continues: a part that has passed runs again only if a file of the checkout has changed.
# PYTHON is the interpreter (3.10 to 3.12), DEVICE=cuda takes FBGEMM's CUDA build, PARTS are folders of tests/,
# JOBS how many tests run at once, PART_MINUTES the longest that a part may take. Exit code 1 if a part did not pass.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
set=${1:-}
python=${PYTHON:-python3}
device=${DEVICE:-$(command -v nvidia-smi >/dev/null && echo cuda || echo cpu)}
parts=${PARTS:-unit distributed integration docs gpu}
if [[ $# -lt 1 || $# -gt 2 || $set == -* ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    [[ $set == -h || $set == --help ]] && exit 0 || exit 2
fi
for pinned in cpu cuda; do
    lists+=("$("$python" -m dlrm.system.package_sets "$set" <"requirements/$pinned.txt")") || exit 2
done
mkdir -p "${2:-build/sets/$set}"
folder=$(cd "${2:-build/sets/$set}" && pwd)

write_if_changed() { # FILE TEXT: an older file is newer work for make
    [[ -e $1 && $(<"$1") == "$2" ]] || printf '%s\n' "$2" >"$1"
}
write_if_changed "$folder/cpu.txt" "${lists[0]}"
write_if_changed "$folder/cuda.txt" "${lists[1]}"
if ! make --no-print-directory setup PYTHON="$python" DEVICE="$device" VENV="$folder/venv" LISTS="$folder"; then
    echo "$set: FAILED in set-up"
    exit 1
fi

bin=$folder/venv/bin
tree=$(git ls-files --cached --others --exclude-standard -z | xargs -0 sha256sum 2>/dev/null | sha256sum)
for part in $parts; do
    log=$folder/$part.log
    [[ -e $folder/$part.passed && $(<"$folder/$part.passed") == "$tree" ]] && continue
    rm -f "$folder/$part.passed"
    echo "tests/$part: $log"
    code=0
    PATH="$bin:$PATH" timeout --kill-after 60 "${PART_MINUTES:-40}m" "$bin/python" -m pytest "tests/$part" \
        --numprocesses "${JOBS:-logical}" --maxprocesses 4 --dist loadfile >"$log" 2>&1 || code=$?
    case $code in
        0 | 5) echo "$tree" >"$folder/$part.passed" ;; # 5: no test in there
        124 | 137) echo "timeout: more than ${PART_MINUTES:-40} minutes" | tee -a "$log" ;;
    esac
    tail -n 1 "$log"
done

count() { # WORD: over the parts' last lines
    for part in $parts; do tail -n 1 "$folder/$part.log"; done | { grep -oE "[0-9]+ $1" || true; } | awk '{ sum += $1 } END { print sum + 0 }'
}
verdict=passed
for part in $parts; do [[ -e $folder/$part.passed ]] || verdict="FAILED, tests/$part at last: $folder/$part.log"; done
releases=$("$bin/dlrm" doctor --no_device | sed -n 's/^.*  versions  *\(.*\): the .* set$/\1/p')
echo "$set: $verdict. $(count passed) passed, $(count failed) failed, $(count error) errors, $(count skipped) skipped" \
    "in tests/{${parts// /,}} with $releases, $("$bin/python" --version)"
[[ $verdict == passed ]]
