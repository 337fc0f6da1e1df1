# shellcheck shell=bash
# Words that every script here uses.  Sourced, never run; the caller has set -euo pipefail.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck disable=SC2034 # used by those who source this
VENV=$ROOT/.venv

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# retry TRIES COMMAND...: runs it until it succeeds, with a growing pause; the last failure's status otherwise.
retry() {
    local tries=$1 pause_s=2 status=0 attempt
    shift
    for ((attempt = 1; attempt <= tries; attempt++)); do
        "$@" && return 0
        status=$?
        if ((attempt < tries)); then
            say "failed ($status), again in $pause_s s: $*"
            sleep "$pause_s"
            pause_s=$((pause_s * 3))
        fi
    done
    return "$status"
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "root is needed for: $*"
    fi
}
