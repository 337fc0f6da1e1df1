# shellcheck shell=bash
# What a test run must not leave behind: mounts, processes, files.  Sourced after common.sh.
#
# Everything that a run makes lies in its own TMPDIR, and each process it starts carries APOLLOFS_TEST_RUN=<id> in its
# environment: so nothing that belongs to somebody else is ever counted, or touched.

# Mountpoints below a directory, deepest first, as mountinfo escapes them.
mounts_below() {
    awk -v below="$1/" 'index($5 "/", below) == 1 { print $5 }' /proc/self/mountinfo | sort -r
}

# Processes that carry the id of a run.
processes_of_run() {
    { grep -lzxF "APOLLOFS_TEST_RUN=$1" /proc/[0-9]*/environ 2>/dev/null || true; } | cut -d/ -f3
}

# wait_for_processes ID: gives what was told to end a few seconds to do so.
wait_for_processes() {
    local tries
    for ((tries = 0; tries < 25; tries++)); do
        [[ -n $(processes_of_run "$1") ]] || return 0
        sleep 0.2
    done
}

# clean_leftovers ID DIRECTORY: ends and unmounts what is left, saying what it was.  1 if there was anything.
clean_leftovers() {
    local id=$1 directory=$2 mountpoint pid found=0
    wait_for_processes "$id"
    while read -r mountpoint; do
        found=1
        say "left mounted by the tests: $mountpoint"
        umount --lazy "$(printf '%b' "$mountpoint")" || fusermount3 -u -z "$(printf '%b' "$mountpoint")" || true
    done < <(mounts_below "$directory")
    while read -r pid; do
        found=1
        say "left running by the tests: $pid $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null)"
        kill -KILL "$pid" 2>/dev/null || true
    done < <(processes_of_run "$id")
    return "$found"
}
