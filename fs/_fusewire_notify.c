/* Many notifications in one call, with the GIL let go once: what is handed back when a delegation ends.
 * See _fusewire.pyi for the signatures. */
#define _GNU_SOURCE
#include "_fusewire.h"

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

#define NOTIFY_INVAL_INODE 2
#define NOTIFY_INVAL_ENTRY 3
#define EXPIRE_ONLY 1u
#define NAME_BYTES_MAX 255

struct inval_inode {
    uint64_t ino;
    int64_t offset;                 /* negative: attributes only */
    int64_t length;
};

struct inval_entry {
    uint64_t parent;
    uint32_t name_len;
    uint32_t flags;
};

struct name {
    const char *bytes;
    Py_ssize_t len;
};

/* 0, or an errno; ENOENT says that the kernel has nothing of the kind. */
static int notify(int fd, int code, const void *head, size_t head_len, const char *name, size_t name_len)
{
    struct fw_out_header header = {.len = (uint32_t)(sizeof(header) + head_len + name_len), .error = code};
    struct iovec parts[3] = {
        {&header, sizeof(header)}, {(void *)head, head_len}, {(void *)name, name_len},
    };

    if (writev(fd, parts, name ? 3 : 2) >= 0)
        return 0;
    return errno == ENOTDIR ? ENOENT : errno;
}

PyObject *fw_invalidate_inodes(PyObject *module, PyObject *args)
{
    int fd, error = 0;
    long long offset;               /* of the first page to drop; negative: attributes only */
    Py_buffer numbers;
    Py_ssize_t count, missing = 0;
    uint64_t *inos, *unknown;
    PyObject *found = NULL;

    if (!PyArg_ParseTuple(args, "iy*L", &fd, &numbers, &offset))
        return NULL;
    count = numbers.len / (Py_ssize_t)sizeof(uint64_t);
    inos = PyMem_RawMalloc(2 * numbers.len + 1);
    if (!inos) {
        PyBuffer_Release(&numbers);
        return PyErr_NoMemory();
    }
    unknown = inos + count;
    memcpy(inos, numbers.buf, count * sizeof(uint64_t));
    PyBuffer_Release(&numbers);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++) {
        struct inval_inode body = {.ino = inos[i], .offset = offset, .length = 0};

        error = notify(fd, NOTIFY_INVAL_INODE, &body, sizeof(body), NULL, 0);
        if (error == ENOENT)
            unknown[missing++] = inos[i];
        else if (error)
            break;
    }
    Py_END_ALLOW_THREADS
    if (error && error != ENOENT) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
    } else {
        found = PyBytes_FromStringAndSize((const char *)unknown, missing * (Py_ssize_t)sizeof(uint64_t));
    }
    PyMem_RawFree(inos);
    return found;
}

static int expire_all(int fd, uint64_t parent, const struct name *names, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        struct inval_entry body = {.parent = parent, .name_len = (uint32_t)names[i].len, .flags = EXPIRE_ONLY};
        int error = notify(fd, NOTIFY_INVAL_ENTRY, &body, sizeof(body), names[i].bytes, (size_t)names[i].len + 1);

        if (error && error != ENOENT)
            return error;
    }
    return 0;
}

PyObject *fw_expire_entries(PyObject *module, PyObject *args)
{
    int fd, error;
    unsigned long long parent;
    PyObject *tuple;
    struct name *names;
    Py_ssize_t count;

    if (!PyArg_ParseTuple(args, "iKO!", &fd, &parent, &PyTuple_Type, &tuple))
        return NULL;
    count = PyTuple_GET_SIZE(tuple);
    names = PyMem_RawCalloc((size_t)count + 1, sizeof(*names));
    if (!names)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyTuple_GET_ITEM(tuple, i);

        if (!PyBytes_Check(item) || PyBytes_GET_SIZE(item) > NAME_BYTES_MAX) {
            PyMem_RawFree(names);
            PyErr_SetString(PyExc_ValueError, "names are bytes, 255 of them at most");
            return NULL;
        }
        names[i] = (struct name){PyBytes_AS_STRING(item), PyBytes_GET_SIZE(item)};
    }
    /* the caller's argument tuple keeps `tuple`, and that keeps the names, while the GIL is let go */
    Py_BEGIN_ALLOW_THREADS
    error = expire_all(fd, parent, names, count);
    Py_END_ALLOW_THREADS
    PyMem_RawFree(names);
    if (error) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}
