/* The module object: it has no Python functions; the kernels are exported C symbols. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "C kernels, opened by ctypes (see kernels.py).",
    .m_size = 0,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
