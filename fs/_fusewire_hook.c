/* The half of _fusewire that libfuse calls.
 *
 * fuse_session_mount() below is the one libfuse symbol that is interposed: the
 * extension is loaded RTLD_GLOBAL before pyfuse3, so pyfuse3's call lands here.
 * It calls the real function and then installs libfuse's own public custom-io
 * hook on the same session and the same descriptor.  From then on every raw
 * request passes hook_read() before libfuse parses it, and every raw reply
 * passes hook_writev() after libfuse has built it.
 *
 * pyfuse3 calls libfuse with the GIL held, except for notifications.
 */
#define _GNU_SOURCE
#include "_fusewire.h"

#define FUSE_USE_VERSION 32
#include <fuse_lowlevel.h>          /* by pkg-config: fuse_session_custom_io differs between versions */

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define ANSWERED_AT_ONCE_MAX 16     /* requests answered inside one hook_read() before pyfuse3 gets its turn */
#define ERRNO_MAX 511               /* the kernel refuses larger ones and the caller would hang */
#define PAGE_BYTES 4096

enum verdict { GIVE_TO_LIBFUSE, TAKEN, ANSWERED };

struct fw_hook fw = {
    .fd = -1,
    .settings = {
        .max_stack_depth = FW_NOT_SET,
        .max_readahead = FW_NOT_SET,
        .max_background = FW_NOT_SET,
        .congestion_threshold = FW_NOT_SET,
        .max_write = FW_NOT_SET,
        .time_gran = FW_NOT_SET,
    },
};

static int wants_reply(uint32_t opcode)
{
    return opcode != FW_FORGET && opcode != FW_BATCH_FORGET && opcode != FW_INTERRUPT && opcode != FW_NOTIFY_REPLY;
}

static void count_reply(uint64_t unique)
{
    if (unique && !(unique & FW_UNIQUE_INTERRUPT_BIT) && fw.in_flight > 0)
        fw.in_flight--;
}

int fw_send_reply(uint64_t unique, int error, const void *data, size_t len)
{
    struct fw_out_header header = {.unique = unique};
    struct iovec parts[2] = {{&header, sizeof(header)}, {(void *)data, len}};

    if (error < 0 || error > ERRNO_MAX || (!error && len > UINT32_MAX - sizeof(header)))
        error = EIO;
    if (error)
        parts[1].iov_len = 0;
    header.error = -error;
    header.len = (uint32_t)(sizeof(header) + parts[1].iov_len);
    count_reply(unique);
    return writev(fw.fd, parts, parts[1].iov_len ? 2 : 1) < 0 ? -1 : 0;
}

/* Hand the exception that is set to on_error(opcode, exception); clears it. */
static void report_exception(uint32_t opcode)
{
    PyObject *type, *value, *traceback, *done = NULL;

    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    if (fw.settings.on_error && value)
        done = PyObject_CallFunction(fw.settings.on_error, "IO", opcode, value);
    if (!done) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "a wire callback failed and no on_error is configured");
        PyErr_WriteUnraisable(value);
    }
    Py_XDECREF(done);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

static void send_or_report(uint64_t unique, uint32_t opcode, int error, const void *data, size_t len)
{
    if (fw_send_reply(unique, error, data, len) == 0 || errno == ENOENT)
        return;                     /* ENOENT: the request is gone, as after an abort of the connection */
    PyErr_SetFromErrno(PyExc_OSError);
    report_exception(opcode);
}

/* Ask dispatch() about an intercepted request.  Whatever happens in Python, the caller gets a reply. */
static enum verdict dispatch(const struct fw_in_header *request, size_t body_len)
{
    PyObject *result;
    enum verdict verdict = ANSWERED;

    result = PyObject_CallFunction(fw.settings.dispatch, "IKKIIIy#", request->opcode,
        (unsigned long long)request->unique, (unsigned long long)request->nodeid, request->uid, request->gid,
        request->pid, (const char *)(request + 1), (Py_ssize_t)body_len);
    if (!result) {
        report_exception(request->opcode);
        send_or_report(request->unique, request->opcode, EIO, NULL, 0);
    } else if (result == Py_False) {
        verdict = GIVE_TO_LIBFUSE;
    } else if (result == Py_None) {
        verdict = TAKEN;
    } else if (PyBytes_Check(result)) {
        send_or_report(request->unique, request->opcode, 0, PyBytes_AS_STRING(result),
            (size_t)PyBytes_GET_SIZE(result));
    } else if (PyLong_Check(result)) {
        long error = PyLong_AsLong(result);

        if (error == -1 && PyErr_Occurred())
            PyErr_Clear();          /* too large for a long: sent as EIO */
        send_or_report(request->unique, request->opcode, error < 0 || error > ERRNO_MAX ? EIO : (int)error, NULL, 0);
    } else {
        PyErr_Format(PyExc_TypeError, "dispatch returned %R: not bytes, int, None or False", result);
        report_exception(request->opcode);
        send_or_report(request->unique, request->opcode, EIO, NULL, 0);
    }
    Py_XDECREF(result);
    return verdict;
}

/* Every INTERRUPT ends here.  Handing it on to libfuse would only set a flag that pyfuse3 never reads, and for
 * requests that libfuse never saw it would answer EAGAIN, which makes the kernel send it again. */
static void interrupted(const struct fw_in_header *request, size_t body_len)
{
    struct fw_interrupt_in body;
    PyObject *result;

    if (body_len < sizeof(body))
        return;
    memcpy(&body, request + 1, sizeof(body));
    result = PyObject_CallFunction(fw.settings.interrupt, "K", (unsigned long long)body.unique);
    if (!result)
        report_exception(FW_INTERRUPT);
    Py_XDECREF(result);
}

static void remember_current(const struct fw_in_header *request, size_t body_len)
{
    fw.current = *request;
    fw.current_body_len = body_len < FW_BODY_KEPT ? body_len : FW_BODY_KEPT;
    memcpy(fw.current_body, request + 1, fw.current_body_len);
}

static enum verdict examine(const struct fw_in_header *request, size_t body_len)
{
    fw.hot = 1;
    if (request->opcode < FW_OPCODES_MAX)
        fw.counts[request->opcode]++;
    if (wants_reply(request->opcode))
        fw.in_flight++;
    if (request->opcode == FW_INTERRUPT && fw.settings.interrupt) {
        interrupted(request, body_len);
        return TAKEN;
    }
    if (request->opcode == FW_INIT) {
        fw.init_unique = request->unique;
        memset(&fw.init_in, 0, sizeof(fw.init_in));
        memcpy(&fw.init_in, request + 1, body_len < sizeof(fw.init_in) ? body_len : sizeof(fw.init_in));
        if (!(fw.init_in.flags & FW_INIT_EXT))
            fw.init_in.flags2 = 0;
    } else if (request->opcode < FW_OPCODES_MAX && fw.settings.intercept[request->opcode] && fw.settings.dispatch) {
        enum verdict verdict = dispatch(request, body_len);

        if (verdict != GIVE_TO_LIBFUSE)
            return verdict;
    }
    remember_current(request, body_len);
    return GIVE_TO_LIBFUSE;
}

static int64_t monotonic_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* The queue is empty.  The client that was just answered may be back at once: look for it a moment longer rather than
 * pay a round of the event loop, awake because waking up would cost more than most requests do.  Not while a request
 * is in flight: its progress depends on that loop. */
static int linger(int fd)
{
    struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
    int64_t end_us;
    int ready;

    if (fw.settings.linger_us <= 0 || !fw.hot || fw.in_flight)
        return 0;
    fw.hot = 0;
    Py_BEGIN_ALLOW_THREADS
    end_us = monotonic_us() + fw.settings.linger_us;
    do
        ready = poll(&poll_fd, 1, 0);
    while (!ready && monotonic_us() < end_us);
    Py_END_ALLOW_THREADS
    return ready > 0;
}

/* libfuse's read.  -1 with EINTR means "nothing for you, come again": the only error that pyfuse3 retries. */
static ssize_t hook_read(int fd, void *buf, size_t len, void *userdata)
{
    int answered = 0;

    for (;;) {
        const struct fw_in_header *request = buf;
        ssize_t n = read(fd, buf, len);

        if (n < 0 && errno == EAGAIN) {
            if (linger(fd))
                continue;
            fw.dry = 1;
            fw.hot = 0;
            fw.dry_count++;
            errno = EINTR;
            return -1;
        }
        if (n < (ssize_t)sizeof(*request))
            return n;
        switch (examine(request, (size_t)n - sizeof(*request))) {
        case GIVE_TO_LIBFUSE:
            return n;
        case TAKEN:
            answered = ANSWERED_AT_ONCE_MAX;
            break;
        case ANSWERED:
            answered++;
        }
        if (answered >= ANSWERED_AT_ONCE_MAX || !(fcntl(fd, F_GETFL) & O_NONBLOCK)) {
            errno = EINTR;
            return -1;
        }
    }
}

static void patch_init(struct fw_init_out *out)
{
    const struct fw_settings *s = &fw.settings;
    uint64_t offered = fw.init_in.flags | (uint64_t)fw.init_in.flags2 << 32;
    uint64_t flags = out->flags | (uint64_t)out->flags2 << 32;

    flags = (flags & ~s->clear_flags) | (s->set_flags & offered);
    if (flags >> 32)
        flags |= FW_INIT_EXT;
    out->flags = (uint32_t)flags;
    out->flags2 = (uint32_t)(flags >> 32);
    if (s->max_stack_depth != FW_NOT_SET)
        out->max_stack_depth = (uint32_t)s->max_stack_depth;
    if (s->max_readahead != FW_NOT_SET)
        out->max_readahead = (uint32_t)s->max_readahead;
    if (s->max_background != FW_NOT_SET)
        out->max_background = (uint16_t)s->max_background;
    if (s->congestion_threshold != FW_NOT_SET)
        out->congestion_threshold = (uint16_t)s->congestion_threshold;
    if (s->time_gran != FW_NOT_SET)
        out->time_gran = (uint32_t)s->time_gran;
    /* Only downwards: libfuse has already sized its buffers. */
    if (s->max_write != FW_NOT_SET && s->max_write < out->max_write) {
        out->max_write = (uint32_t)s->max_write;
        out->max_pages = (uint16_t)((s->max_write - 1) / PAGE_BYTES + 1);
    }
    fw.init_out = *out;
    fw.init_patched = 1;
}

/* Take the announced flags for this reply out of the table; 0 if there are none. */
static int take_open_reply(uint64_t unique, struct fw_open_reply *found)
{
    for (size_t i = 0; i < fw.open_replies_len; i++)
        if (fw.open_replies[i].unique == unique) {
            *found = fw.open_replies[i];
            fw.open_replies[i] = fw.open_replies[--fw.open_replies_len];
            return 1;
        }
    return 0;
}

static void patch_open(struct fw_open_out *out, const struct fw_open_reply *announced)
{
    out->open_flags |= announced->flags;
    if (out->open_flags & FW_FOPEN_PASSTHROUGH) {
        out->open_flags &= ~FW_FOPEN_KEEP_CACHE;    /* the kernel answers EIO to the two together */
        out->backing_id = announced->backing_id;
    }
}

/* libfuse's writev. */
static ssize_t hook_writev(int fd, struct iovec *iov, int count, void *userdata)
{
    const struct fw_out_header *header = iov[0].iov_base;
    unsigned char copy[FW_ENTRY_OUT_BYTES + sizeof(struct fw_open_out)] __attribute__((aligned(8)));
    struct iovec patched[2];
    struct fw_open_reply announced;
    size_t len;

    if (header->unique == 0)        /* a notification: no GIL here */
        return writev(fd, iov, count);
    count_reply(header->unique);
    len = count == 2 && !header->error ? iov[1].iov_len : 0;
    if (header->unique == fw.init_unique) {
        fw.init_unique = 0;
        if (len != sizeof(struct fw_init_out))
            return writev(fd, iov, count);
        memcpy(copy, iov[1].iov_base, len);
        patch_init((struct fw_init_out *)copy);
    } else if (fw.open_replies_len && take_open_reply(header->unique, &announced)) {
        size_t at = len == sizeof(copy) ? FW_ENTRY_OUT_BYTES : 0;   /* CREATE: the entry comes first */

        if (len != at + sizeof(struct fw_open_out))
            return writev(fd, iov, count);
        memcpy(copy, iov[1].iov_base, len);
        patch_open((struct fw_open_out *)(copy + at), &announced);
    } else {
        return writev(fd, iov, count);
    }
    patched[0] = iov[0];
    patched[1].iov_base = copy;
    patched[1].iov_len = len;
    return writev(fd, patched, 2);
}

typedef int (*mount_function)(struct fuse_session *, const char *);

/* The function of this name in the libfuse that we are linked to, whatever its soname. */
static mount_function real_mount(void)
{
    Dl_info info;
    void *library;
    mount_function found;

    if (!dladdr((void *)fuse_session_fd, &info))
        return NULL;
    library = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    if (!library)
        return NULL;
    found = (mount_function)dlsym(library, "fuse_session_mount");
    dlclose(library);               /* only our own count: we are linked to it, so it stays */
    return found;
}

__attribute__((visibility("default")))
int fuse_session_mount(struct fuse_session *session, const char *mountpoint)
{
    static const struct fuse_custom_io io = {.writev = hook_writev, .read = hook_read};
    mount_function mount = real_mount();

    if (!mount || mount == fuse_session_mount) {
        fprintf(stderr, "apollofs: libfuse's fuse_session_mount was not found\n");
        return -1;
    }
    if (mount(session, mountpoint) != 0)
        return -1;
    if (fuse_session_custom_io(session, &io, fuse_session_fd(session)) != 0) {
        fprintf(stderr, "apollofs: libfuse refused the custom io of the wire hook\n");
        fuse_session_unmount(session);
        return -1;
    }
    fw.session = session;
    fw.fd = fuse_session_fd(session);
    fw.dry = fw.hot = fw.init_patched = 0;
    fw.in_flight = fw.init_unique = 0;
    fw.open_replies_len = 0;
    memset(fw.counts, 0, sizeof(fw.counts));
    memset(&fw.current, 0, sizeof(fw.current));
    fw.current_body_len = 0;
    return 0;
}
