# shellcheck shell=bash
# How many tests run side by side.  Sourced after common.sh.

# test_workers: two for each core, since half of the tests wait for leases and deadlines to pass; not more than the memory
# is good for (a worker and its servers take up to 2 GB), nor than there are long files to share out.
test_workers() {
    local cores memory_gb workers
    cores=$(nproc)
    memory_gb=$(awk '/^MemTotal/ { print int($2 / 1048576) }' /proc/meminfo)
    workers=$((2 * cores < memory_gb / 2 ? 2 * cores : memory_gb / 2))
    echo $((workers < 1 ? 1 : workers > 8 ? 8 : workers))
}

# Arguments of pytest.  A file is run as a whole, by one worker: what its tests share is made once.  Files are taken in
# the order of collection (tests/support/running_order.py).
# shellcheck disable=SC2034 # used by those who source this
PARALLEL=(-n "$(test_workers)" --dist loadfile --no-loadscope-reorder)
