# shellcheck shell=bash
# What processes that train do with memory that they have freed; source it, do not run it.

# Training frees the memory of all gradients in each step and takes it again. glibc gives it back to the system in between, and new pages cost more than
# the pass that fills them (benchmarks/README.md), so processes keep it, unless the user has chosen. A glibc before 2.36 may refuse more than 32 MiB.
keep_freed_memory() {
    [ -z "${MALLOC_MMAP_THRESHOLD_+set}${MALLOC_TRIM_THRESHOLD_+set}" ] || return 0
    local version
    version=$(getconf GNU_LIBC_VERSION 2>/dev/null) || return 0
    [[ $version =~ ^glibc\ ([0-9]+)\.([0-9]+) ]] || return 0
    export MALLOC_TRIM_THRESHOLD_=1099511627776 MALLOC_MMAP_THRESHOLD_=33554432
    if ((BASH_REMATCH[1] > 2 || BASH_REMATCH[2] >= 36)); then MALLOC_MMAP_THRESHOLD_=1073741824; fi
}
