/* What the two halves of the _fusewire extension share.
 *
 * _fusewire_hook.c  the functions that libfuse calls (read, writev, mount)
 * _fusewire.c       the Python module: settings, state, replies
 * _fusewire_notify.c  many notifications at once; touches nothing of the state
 *
 * Everything here is read and written with the GIL held.  The only calls that
 * arrive without it are notifications (writev with unique 0), which touch
 * nothing of this.  One process has one session: so does pyfuse3.
 */
#ifndef APOLLOFS_FUSEWIRE_H
#define APOLLOFS_FUSEWIRE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_fusewire_abi.h"

#define FW_OPCODES_MAX 64           /* opcodes at or above this are left to libfuse */
#define FW_BODY_KEPT 128            /* bytes of a request's body that current() shows */
#define FW_OPEN_REPLIES_MAX 1024    /* OPEN and CREATE replies announced and not yet sent */
#define FW_NOT_SET (-1)

struct fuse_session;

/* What configure() sets.  The numbers go into the INIT reply; FW_NOT_SET leaves libfuse's value. */
struct fw_settings {
    unsigned long long set_flags;
    unsigned long long clear_flags;
    long long max_stack_depth;
    long long max_readahead;
    long long max_background;
    long long congestion_threshold;
    long long max_write;
    long long time_gran;
    long long linger_us;
    unsigned char intercept[FW_OPCODES_MAX];
    PyObject *dispatch;             /* strong references, or NULL */
    PyObject *interrupt;
    PyObject *on_error;
};

struct fw_open_reply {
    uint64_t unique;
    uint32_t flags;
    int32_t backing_id;
};

struct fw_hook {
    struct fw_settings settings;
    struct fuse_session *session;   /* NULL until fuse_session_mount() has come through here */
    int fd;
    int dry;                        /* the last read found the queue empty */
    int hot;                        /* a request was read since the last time it was empty */
    uint64_t in_flight;             /* requests read and not yet answered */
    uint64_t dry_count;
    uint64_t counts[FW_OPCODES_MAX];
    uint64_t init_unique;
    int init_patched;
    struct fw_init_in init_in;
    struct fw_init_out init_out;
    struct fw_in_header current;    /* the request most recently handed to pyfuse3 */
    size_t current_body_len;
    unsigned char current_body[FW_BODY_KEPT];
    size_t open_replies_len;
    struct fw_open_reply open_replies[FW_OPEN_REPLIES_MAX];
};

extern struct fw_hook fw;

/* Send one reply for `unique`.  error is 0 or a positive errno; anything a reply
 * cannot carry becomes EIO.  Returns 0, or -1 with errno set by writev(2). */
int fw_send_reply(uint64_t unique, int error, const void *data, size_t len);

/* Functions of the module that are in _fusewire_notify.c. */
PyObject *fw_invalidate_inodes(PyObject *module, PyObject *args);
PyObject *fw_expire_entries(PyObject *module, PyObject *args);

#endif
