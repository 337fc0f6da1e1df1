"""What pyproject.toml cannot say: the folder each package lives in, and the C extension.

The import names are `apollofs.fs`, `apollofs.metadata` and `apollofs.blobstore`; the folders stand at the top of
the repository as `fs`, `metadata` and `blobstore`.  There is no `apollofs` folder: it is a namespace package.
"""

import shlex
import subprocess
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
TOP_FOLDERS = ("blobstore", "fs", "metadata")


def packages() -> list[str]:
    """Every folder with Python modules in it under the three top folders, by its import name."""
    found = []
    for top in TOP_FOLDERS:
        found.append(f"apollofs.{top}")
        found += [f"apollofs.{top}.{inner}" for inner in find_namespace_packages(str(ROOT / top))]
    return [name for name in found if any((ROOT / name.partition(".")[2].replace(".", "/")).glob("*.py"))]


def pkg_config(option: str) -> list[str]:
    """Flags for libfuse 3, as the system's pkg-config gives them.

    Raises SystemExit with the packages to install where pkg-config or the headers are missing.
    """
    try:
        done = subprocess.run(["pkg-config", option, "fuse3"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        raise SystemExit("apollofs needs libfuse 3 to build: apt-get install gcc pkg-config libfuse3-dev") from exc
    return shlex.split(done.stdout)


def extensions() -> list[Extension]:
    """The wire hook: fs/_fusewire.c and, where it is split, fs/_fusewire_*.c."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "fs").glob("_fusewire*.c"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "fs").glob("_fusewire*.h"))
    if not sources:
        return []
    return [
        Extension(
            "apollofs.fs._fusewire",
            sources=sources,
            depends=headers,
            extra_compile_args=[*pkg_config("--cflags"), "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter"],
            extra_link_args=[*pkg_config("--libs"), "-ldl"],
        )
    ]


setup(
    package_dir={f"apollofs.{top}": top for top in TOP_FOLDERS},
    packages=packages(),
    package_data={"": ["py.typed", "*.pyi"]},
    include_package_data=False,
    ext_modules=extensions(),
)
