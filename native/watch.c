/*
 * watch.c: whether Python's containers and torch's tensors are as they were.
 *
 * Theory of operation.  Every save asks, in the training's own time, so all of it is one walk over one array of words
 * that says which objects were seen and what was in them: about 0.4 us a tensor, most of it the latency of memory,
 * where a loop of Python's takes three times as long.  Nothing is allocated, changed or kept; an object is only ever
 * compared by its address, and the caller keeps all of them alive, so that no address comes to mean another object.
 *
 * Containers are asked through Python's stable ABI.  Tensors are asked through DLPack's exchange table, which torch
 * 2.13 has and older ones may lack (ATen/dlpack.h, "DLPackExchangeAPI").  It gives a tensor's address, dtype, shape and
 * strides without a Python object being made.  It does not know `requires_grad`.
 *
 * Rules: called with the GIL, unlike everything else here, so not through cffi, which lets go of it.  What an object
 * raises is taken for a difference and cleared: whoever then walks the objects in Python meets it again.  What is no
 * Exception (Ctrl-C) is not the object's, and is left to be raised.  Python code can run in `requires_grad`, of a subclass
 * of Tensor or under a mode such as `torch.device`, and where a class of the user's says its size; no reference that
 * is not ours outlasts that.
 */
#include <Python.h>
#include <string.h>

#include "engine_native.h"

/* Of dlpack.h, version 1.3, whose version 1 is a stable ABI. */
enum { DLPACK_MAJOR_VERSION = 1 };

typedef struct {
    void *data;
    int32_t device_type;
    int32_t device_id;
    int32_t ndim;
    uint8_t dtype_code;
    uint8_t dtype_bits;
    uint16_t dtype_lanes;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
} dl_tensor;

typedef struct {
    uint32_t major_version;
    uint32_t minor_version;
    void *older;
    void *managed_tensor_allocator;
    void *managed_tensor_from_object;
    void *managed_tensor_to_object;
    int (*tensor_from_object)(void *object, dl_tensor *tensor); /* 0, or -1 with an exception set */
    void *current_work_stream;
} dl_exchange;

_Static_assert(sizeof(void *) == sizeof(uint64_t), "addresses are words");

static PyObject *object_of(uint64_t word)
{
    return (PyObject *)(uintptr_t)word;
}

static uint64_t word_of(const void *pointer)
{
    return (uint64_t)(uintptr_t)pointer;
}

/* An answer of yes or no, which is no if something has raised; see the rules above. */
static int unless_raised(int answer)
{
    if (!PyErr_Occurred())
        return answer;
    if (PyErr_ExceptionMatches(PyExc_Exception))
        PyErr_Clear();
    return 0;
}

static int same_dict(PyObject *dict, const uint64_t *items, uint64_t count)
{
    if (PyDict_Size(dict) != (Py_ssize_t)count)
        return 0;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (uint64_t i = 0; i < count; i++)
        if (!PyDict_Next(dict, &position, &key, &value) || word_of(key) != items[2 * i] ||
            word_of(value) != items[2 * i + 1])
            return 0;
    return 1;
}

static int same_members(PyObject *dict, const uint64_t *items, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        PyObject *value = PyDict_GetItemWithError(dict, object_of(items[2 * i]));
        if (word_of(value != NULL ? value : Py_None) != items[2 * i + 1])
            return 0;
    }
    return 1;
}

static int same_list(PyObject *list, const uint64_t *items, uint64_t count)
{
    if (PyList_Size(list) != (Py_ssize_t)count)
        return 0;
    for (uint64_t i = 0; i < count; i++)
        if (word_of(PyList_GetItem(list, (Py_ssize_t)i)) != items[i])
            return 0;
    return 1;
}

int eng_same_containers(const uint64_t *words, uint64_t word_count)
{
    int same = 1;
    const uint64_t *end = words + word_count;
    while (same && words < end) {
        PyObject *container = object_of(words[0]);
        uint64_t kind = words[1], count = words[2];
        words += ENG_CONTAINER_WORDS;
        switch (kind) {
        case ENG_SIZED:
            same = PyObject_Size(container) == (Py_ssize_t)count;
            break;
        case ENG_DICT:
            same = same_dict(container, words, count);
            words += 2 * count;
            break;
        case ENG_MEMBERS:
            same = same_members(container, words, count);
            words += 2 * count;
            break;
        default: /* ENG_LIST */
            same = same_list(container, words, count);
            words += count;
        }
    }
    return unless_raised(same);
}

/* The words of a tensor that every one has: its address, its dtype, how many dimensions.  The rest is in `tensor`. */
static int describe(const dl_exchange *exchange, uint64_t object, dl_tensor *tensor, uint64_t head[3])
{
    if (exchange->tensor_from_object(object_of(object), tensor))
        return -1;
    head[0] = word_of(tensor->data) + tensor->byte_offset;
    head[1] = (uint64_t)tensor->dtype_code << 24 | (uint64_t)tensor->dtype_bits << 16 | tensor->dtype_lanes;
    head[2] = (uint64_t)tensor->ndim;
    return 0;
}

static int same_grad(uint64_t object, uint64_t trained, PyObject *name)
{
    if (trained == ENG_GRAD_IGNORED)
        return 1;
    PyObject *grad = PyObject_GetAttr(object_of(object), name);
    int same = grad == (trained == ENG_GRAD_WANTED ? Py_True : Py_False);
    Py_XDECREF(grad);
    return same;
}

static int same_tensors(const dl_exchange *exchange, const uint64_t *words, const uint64_t *end, PyObject *grad_name)
{
    while (words < end) {
        dl_tensor tensor;
        uint64_t head[3], ndim = words[4];
        size_t nbytes = ndim * sizeof(int64_t);
        if (describe(exchange, words[0], &tensor, head) || memcmp(head, words + 2, sizeof head) != 0 ||
            (ndim && memcmp(tensor.shape, words + ENG_TENSOR_WORDS, nbytes) != 0) ||
            (ndim && memcmp(tensor.strides, words + ENG_TENSOR_WORDS + ndim, nbytes) != 0) ||
            !same_grad(words[0], words[1], grad_name))
            return 0;
        words += ENG_TENSOR_WORDS + 2 * ndim;
    }
    return 1;
}

int eng_same_tensors(const void *exchange, const uint64_t *words, uint64_t word_count)
{
    PyObject *grad_name = PyUnicode_InternFromString("requires_grad");
    int same = grad_name && same_tensors(exchange, words, words + word_count, grad_name);
    Py_XDECREF(grad_name);
    return unless_raised(same);
}

int eng_describe_tensors(const void *table, uint64_t *words, uint64_t word_count)
{
    const dl_exchange *exchange = table;
    if (exchange->major_version != DLPACK_MAJOR_VERSION || !exchange->tensor_from_object)
        return 0;
    const uint64_t *end = words + word_count;
    while (words < end) {
        dl_tensor tensor;
        uint64_t head[3], ndim = words[4];
        if (describe(exchange, words[0], &tensor, head) || head[2] != ndim)
            return unless_raised(0);
        memcpy(words + 2, head, sizeof head);
        if (ndim) {
            memcpy(words + ENG_TENSOR_WORDS, tensor.shape, ndim * sizeof(int64_t));
            memcpy(words + ENG_TENSOR_WORDS + ndim, tensor.strides, ndim * sizeof(int64_t));
        }
        words += ENG_TENSOR_WORDS + 2 * ndim;
    }
    return 1;
}
