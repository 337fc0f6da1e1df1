# shellcheck shell=bash
# How many tests run side by side.  Sourced after common.sh.

# test_workers PER_CORE: not more than the memory is good for (a worker and its servers take up to 2 GB), nor than there
# are long files to share out.
test_workers() {
    local wanted memory_gb
    wanted=$(($1 * $(nproc)))
    memory_gb=$(awk '/^MemTotal/ { print int($2 / 1048576) }' /proc/meminfo)
    ((wanted <= memory_gb / 2)) || wanted=$((memory_gb / 2))
    echo $((wanted < 1 ? 1 : wanted > 8 ? 8 : wanted))
}

# side_by_side PER_CORE: sets PARALLEL, arguments of pytest.  A file is run as a whole, by one worker: what its tests
# share is made once.  Files are taken in the order of collection (tests/support/running_order.py).
# shellcheck disable=SC2034 # used by those who source this
side_by_side() { PARALLEL=(-n "$(test_workers "$1")" --dist loadfile --no-loadscope-reorder); }
