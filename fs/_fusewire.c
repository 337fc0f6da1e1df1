/* The Python side of the wire hook: settings, state, replies.  See _fusewire_hook.c for what it does and
 * _fusewire.pyi for the signatures. */
#define _GNU_SOURCE
#include "_fusewire.h"

#define FUSE_USE_VERSION 32
#include <fuse_lowlevel.h>

#include <errno.h>

#define LINGER_US_MAX 1000          /* longer, and other tasks of the event loop would notice */

static int check_range(const char *name, long long value, long long least, long long most)
{
    if (value == FW_NOT_SET || (value >= least && value <= most))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s must be between %lld and %lld, not %lld", name, least, most, value);
    return -1;
}

static int check_settings(const struct fw_settings *s)
{
    if (check_range("max_stack_depth", s->max_stack_depth, 0, 2) ||
        check_range("max_readahead", s->max_readahead, 0, UINT32_MAX) ||
        check_range("max_background", s->max_background, 1, UINT16_MAX) ||
        check_range("congestion_threshold", s->congestion_threshold, 1, UINT16_MAX) ||
        check_range("max_write", s->max_write, 4096, 1 << 30) ||
        check_range("time_gran", s->time_gran, 1, 1000000000) ||
        check_range("linger_us", s->linger_us, 0, LINGER_US_MAX))
        return -1;
    return 0;
}

static int read_opcodes(PyObject *opcodes, unsigned char *intercept)
{
    PyObject *iterator, *item;

    memset(intercept, 0, FW_OPCODES_MAX);
    if (!(iterator = PyObject_GetIter(opcodes)))
        return -1;
    while ((item = PyIter_Next(iterator))) {
        long opcode = PyLong_AsLong(item);

        Py_DECREF(item);
        if (opcode == FW_INIT || opcode == FW_INTERRUPT || opcode <= 0 || opcode >= FW_OPCODES_MAX) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_ValueError, "opcode %ld cannot be intercepted", opcode);
            break;
        }
        intercept[opcode] = 1;
    }
    Py_DECREF(iterator);
    return PyErr_Occurred() ? -1 : 0;
}

static void replace_callable(PyObject **slot, PyObject *value)
{
    PyObject *old = *slot;

    Py_XINCREF(value);
    *slot = value == Py_None ? NULL : value;
    if (value == Py_None)
        Py_DECREF(value);
    Py_XDECREF(old);
}

static PyObject *configure(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"set_flags", "clear_flags", "max_stack_depth", "max_readahead", "max_background",
        "congestion_threshold", "max_write", "time_gran", "linger_us", "intercept", "dispatch", "interrupt",
        "on_error", NULL};
    struct fw_settings s = fw.settings;
    PyObject *intercept = NULL, *dispatch = NULL, *interrupt = NULL, *on_error = NULL;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$KKLLLLLLLOOOO", names, &s.set_flags, &s.clear_flags,
            &s.max_stack_depth, &s.max_readahead, &s.max_background, &s.congestion_threshold, &s.max_write,
            &s.time_gran, &s.linger_us, &intercept, &dispatch, &interrupt, &on_error))
        return NULL;
    if (check_settings(&s) || (intercept && read_opcodes(intercept, s.intercept)))
        return NULL;
    fw.settings = s;
    if (dispatch)
        replace_callable(&fw.settings.dispatch, dispatch);
    if (interrupt)
        replace_callable(&fw.settings.interrupt, interrupt);
    if (on_error)
        replace_callable(&fw.settings.on_error, on_error);
    Py_RETURN_NONE;
}

static PyObject *current_unique(PyObject *module, PyObject *unused)
{
    return PyLong_FromUnsignedLongLong(fw.current.unique);
}

static PyObject *current(PyObject *module, PyObject *unused)
{
    return Py_BuildValue("(IKKIIIy#)", fw.current.opcode, (unsigned long long)fw.current.unique,
        (unsigned long long)fw.current.nodeid, fw.current.uid, fw.current.gid, fw.current.pid,
        (const char *)fw.current_body, (Py_ssize_t)fw.current_body_len);
}

static PyObject *open_reply(PyObject *module, PyObject *args)
{
    unsigned long long unique;
    unsigned int flags;
    int backing_id = 0;
    struct fw_open_reply *slot = NULL;

    if (!PyArg_ParseTuple(args, "KI|i", &unique, &flags, &backing_id))
        return NULL;
    for (size_t i = 0; i < fw.open_replies_len && !slot; i++)
        if (fw.open_replies[i].unique == unique)
            slot = &fw.open_replies[i];
    if (!slot) {
        if (fw.open_replies_len == FW_OPEN_REPLIES_MAX) {
            PyErr_SetString(PyExc_OverflowError, "too many OPEN replies announced and not sent");
            return NULL;
        }
        slot = &fw.open_replies[fw.open_replies_len++];
    }
    *slot = (struct fw_open_reply){.unique = unique, .flags = flags, .backing_id = backing_id};
    Py_RETURN_NONE;
}

static PyObject *reply(PyObject *module, PyObject *args)
{
    unsigned long long unique;
    int error, failed;
    Py_buffer data = {0};

    if (!PyArg_ParseTuple(args, "Ki|y*", &unique, &error, &data))
        return NULL;
    if (fw.fd < 0) {
        PyBuffer_Release(&data);
        PyErr_SetString(PyExc_RuntimeError, "nothing is mounted");
        return NULL;
    }
    failed = fw_send_reply(unique, error, data.buf, data.buf ? (size_t)data.len : 0);
    PyBuffer_Release(&data);
    if (failed && errno != ENOENT)
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyBool_FromLong(!failed);
}

static PyObject *dry(PyObject *module, PyObject *unused)
{
    int was = fw.dry;

    fw.dry = 0;
    return PyBool_FromLong(was);
}

static PyObject *exited(PyObject *module, PyObject *unused)
{
    return PyBool_FromLong(!fw.session || fuse_session_exited(fw.session));
}

/* The session is about to be destroyed by pyfuse3.close(): forget it and everything that was configured. */
static PyObject *detach(PyObject *module, PyObject *unused)
{
    fw.session = NULL;
    fw.fd = -1;
    fw.open_replies_len = 0;
    memset(fw.settings.intercept, 0, sizeof(fw.settings.intercept));
    replace_callable(&fw.settings.dispatch, NULL);
    replace_callable(&fw.settings.interrupt, NULL);
    replace_callable(&fw.settings.on_error, NULL);
    Py_RETURN_NONE;
}

static PyObject *request_counts(void)
{
    PyObject *counts = PyDict_New();

    for (int opcode = 0; counts && opcode < FW_OPCODES_MAX; opcode++) {
        PyObject *key, *value;

        if (!fw.counts[opcode])
            continue;
        key = PyLong_FromLong(opcode);
        value = PyLong_FromUnsignedLongLong(fw.counts[opcode]);
        if (!key || !value || PyDict_SetItem(counts, key, value))
            Py_CLEAR(counts);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    return counts;
}

static PyObject *state(PyObject *module, PyObject *unused)
{
    PyObject *counts = request_counts();

    if (!counts)
        return NULL;
    return Py_BuildValue("{s:O,s:O,s:i,s:K,s:K,s:K,s:I,s:I,s:I,s:I,s:I,s:I,s:K,s:n,s:N}",
        "mounted", fw.session ? Py_True : Py_False,
        "init_patched", fw.init_patched ? Py_True : Py_False,
        "fd", fw.fd,
        "offered_flags", fw.init_in.flags | (unsigned long long)fw.init_in.flags2 << 32,
        "flags", fw.init_out.flags | (unsigned long long)fw.init_out.flags2 << 32,
        "in_flight", (unsigned long long)fw.in_flight,
        "kernel_minor", fw.init_in.minor,
        "max_write", fw.init_out.max_write,
        "max_readahead", fw.init_out.max_readahead,
        "max_background", (unsigned int)fw.init_out.max_background,
        "congestion_threshold", (unsigned int)fw.init_out.congestion_threshold,
        "max_stack_depth", fw.init_out.max_stack_depth,
        "dry_count", (unsigned long long)fw.dry_count,
        "open_replies", (Py_ssize_t)fw.open_replies_len,
        "counts", counts);
}

static PyMethodDef methods[] = {
    {"configure", (PyCFunction)(void (*)(void))configure, METH_VARARGS | METH_KEYWORDS, NULL},
    {"current_unique", current_unique, METH_NOARGS, NULL},
    {"current", current, METH_NOARGS, NULL},
    {"open_reply", open_reply, METH_VARARGS, NULL},
    {"reply", reply, METH_VARARGS, NULL},
    {"dry", dry, METH_NOARGS, NULL},
    {"exited", exited, METH_NOARGS, NULL},
    {"detach", detach, METH_NOARGS, NULL},
    {"expire_entries", fw_expire_entries, METH_VARARGS, NULL},
    {"invalidate_inodes", fw_invalidate_inodes, METH_VARARGS, NULL},
    {"state", state, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_fusewire",
    .m_doc = "The wire hook beneath pyfuse3; use apollofs.fs.wire.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__fusewire(void)
{
    return PyModule_Create(&definition);
}
