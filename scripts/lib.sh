# Shared by the scripts of this directory; sourced, not run.
# shellcheck shell=bash

# shellcheck disable=SC2034 # the scripts that source this use it
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SKERRY_CACHE=${SKERRY_CACHE:-$HOME/.cache/skerry}
export SKERRY_CACHE
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$SKERRY_CACHE/target}
# Of several checkouts that share the cache, this one.
export SKERRY_SOURCE=$repository

say() { printf '%s %s\n' "$(date +%T)" "$*" >&2; }

# fail WHAT REMEDY
fail() {
  printf '\nfailed: %s\nwhat to do: %s\n' "$1" "$2" >&2
  exit 1
}

# What nobody has words for: whatever ends a script says what that was. (A subshell's end is for whoever made it to tell.)
set -E
trap '[ "$BASH_SUBSHELL" -gt 0 ] || printf "\nfailed: %s\nwhat to do: see the message above, mend it and try again\n" "$BASH_COMMAND" >&2' ERR

need_root() {
  [ "$(id -u)" = 0 ] || fail "this starts containers, bridges and mounts" "run it as root (sudo -E $0)"
}

# end_with_children PID: ends a process of ours, if it still runs, and what it started.
end_with_children() {
  local child children
  read -r -a children -d '' < <(cat "/proc/$1"/task/*/children 2>/dev/null) || true
  for child in "${children[@]}"; do end_with_children "$child"; done
  kill "$1" 2>/dev/null || true
}

# with_clock WHAT COMMAND…: runs a long silent command and shows every ten seconds that it still moves.
with_clock() {
  local what=$1 begin=$SECONDS clock status=0
  shift
  (while sleep 10; do say "$what: $((SECONDS - begin)) s so far"; done) &
  clock=$!
  "$@" || status=$?
  kill "$clock" 2>/dev/null || true
  wait "$clock" 2>/dev/null || true
  return "$status"
}

# ship PROFILE PROGRAM [OPTION…]: builds a binary as it ships, into $SKERRY_BIN_DIR; by itself, for what others need of a crate must not get into it.
ship() {
  local profile=$1 program=$2
  shift 2
  [ $# -gt 0 ] || set -- --package "$program"
  with_clock "building $program" cargo build --quiet --profile "$profile" --locked "$@" --bin "$program" >&2 ||
    fail "cargo build" "see the compiler's message above"
  mkdir -p "$SKERRY_BIN_DIR"
  ln -f "$CARGO_TARGET_DIR/$profile/$program" "$SKERRY_BIN_DIR/"
}
