/* The part of the kernel's FUSE ABI that _fusewire.c reads or writes.
 *
 * Written out here because the header that a distribution ships may be older
 * than the kernel that runs (Debian bookworm's linux/fuse.h is FUSE 7.38 and
 * knows neither passthrough nor max_stack_depth).  Names carry an fw_ prefix so
 * that they never clash with those of the system's headers.  The layouts are
 * kernel ABI (include/uapi/linux/fuse.h) and so can only grow at the end.
 */
#ifndef APOLLOFS_FUSEWIRE_ABI_H
#define APOLLOFS_FUSEWIRE_ABI_H

#include <stdint.h>

enum fw_opcode {
    FW_FORGET = 2,
    FW_INIT = 26,
    FW_INTERRUPT = 36,
    FW_NOTIFY_REPLY = 41,
    FW_BATCH_FORGET = 42,
};

#define FW_INIT_EXT (1u << 30)           /* flags2 is valid */

#define FW_FOPEN_KEEP_CACHE (1u << 1)
#define FW_FOPEN_PASSTHROUGH (1u << 7)

/* The kernel marks an INTERRUPT request's own number with bit 0. */
#define FW_UNIQUE_INTERRUPT_BIT 1u

struct fw_in_header {
    uint32_t len;
    uint32_t opcode;
    uint64_t unique;
    uint64_t nodeid;
    uint32_t uid;
    uint32_t gid;
    uint32_t pid;
    uint16_t total_extlen;
    uint16_t padding;
};

struct fw_out_header {
    uint32_t len;
    int32_t error;
    uint64_t unique;
};

struct fw_init_in {
    uint32_t major;
    uint32_t minor;
    uint32_t max_readahead;
    uint32_t flags;
    uint32_t flags2;
    uint32_t unused[11];
};

struct fw_init_out {
    uint32_t major;
    uint32_t minor;
    uint32_t max_readahead;
    uint32_t flags;
    uint16_t max_background;
    uint16_t congestion_threshold;
    uint32_t max_write;
    uint32_t time_gran;
    uint16_t max_pages;
    uint16_t map_alignment;
    uint32_t flags2;
    uint32_t max_stack_depth;
    uint16_t request_timeout;
    uint16_t unused[11];
};

struct fw_interrupt_in {
    uint64_t unique;
};

struct fw_open_out {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};

#define FW_ENTRY_OUT_BYTES 128u          /* struct fuse_entry_out, before open_out in CREATE */

_Static_assert(sizeof(struct fw_in_header) == 40, "kernel ABI");
_Static_assert(sizeof(struct fw_out_header) == 16, "kernel ABI");
_Static_assert(sizeof(struct fw_init_in) == 64, "kernel ABI");
_Static_assert(sizeof(struct fw_init_out) == 64, "kernel ABI");
_Static_assert(sizeof(struct fw_open_out) == 16, "kernel ABI");

#endif
