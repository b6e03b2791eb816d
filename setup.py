"""The native kernels: an optional extension, so that an installation without a compiler works."""

from glob import glob

from setuptools import Extension, setup

sources = sorted(glob("native/*.c"))
setup(
    ext_modules=[
        Extension(
            "pi_system.backends.fss._native",
            sources,
            depends=sorted(glob("native/*.h")),
            extra_compile_args=["-O3", "-std=c11", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
    if sources
    else []
)
