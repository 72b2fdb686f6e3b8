"""Compiles the C kernels with the machine's C compiler when they are first needed, and calls their functions.

The library is kept in a cache folder of the user's, named for the sources, the compiler and the processor. Without a
compiler nothing fails: dispatch.py then chooses the torch references.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

PARTS = ("kernels", "attention", "logprobs", "sampling", "decoding")
SOURCES = tuple(Path(__file__).with_name(f"cpu_{part}.c") for part in PARTS)
HEADERS = tuple(Path(__file__).with_name(name) for name in ("cpu_vectors.h", "cpu_kernels.h"))
FLAGS = (
    "-O3",
    "-march=native",
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
COMPILERS = ("cc", "gcc")
"""Not clang: it calls an OpenMP library of its own, which torch does not load."""
COMPILE_SECONDS = 120


SIGNATURES = {
    "adamw": "ppppi" + "ffffffff",
    "rms_norm": "pipppiif",
    "rms_norm_backward": "pipippppii",
    "swiglu": "pipii",
    "swiglu_backward": "pipipii",
    "rope": "piipipipiiif",
    "rope_store": "pppppppiiii",
    "paged_attention": "pppppppiiiiiiiiif",
    "modify": "ppipiiiff",
    "sample": "pppppiiiii",
    "filter_scores": "ppiiiii",
    "product": "pppiiii",
    "decode": "ppippppippppp" + "iiiiiiiiifi",
    "logprob_statistics": "pippiiiif",
    "logprob_gradient": "pipppppppiiiiif",
    "decode_steps": "pipppppppi" + "ppppi" + "ppppppp" + "i" * 15 + "ff",
    "attention": "pipppiipppiii",
    "attention_backward": "ppipppiippppiii",
}
"""Arguments of each function but the last, the number of threads: p pointer, i int64, f float."""
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


def call(function: str, *arguments: Tensor | int | float) -> None:
    """Calls a function of the library with these arguments and torch's number of threads.

    Of tensors it gets the address: the caller has checked their sizes, types and strides.
    """
    library = load()
    assert library is not None, "the library is not there; see dispatch.use_c"
    pointers = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    getattr(library, function)(*pointers, torch.get_num_threads())


@cache
def load() -> ctypes.CDLL | None:
    """The library, compiled unless the cache has it; None, with a warning, where that is not possible."""
    if platform.system() != "Linux":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), *COMPILERS))), None)
    if compiler is None:
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_SECONDS)
        sources = [path.read_bytes() for path in (*SOURCES, *HEADERS)]
        key = hashlib.sha256(b"\0".join([*sources, version.stdout, *map(str.encode, FLAGS), _processor()]))
        folder = _cache_folder()
        if folder is None:
            with tempfile.TemporaryDirectory() as scratch:
                return _open(_compile(compiler, Path(scratch) / "cpu_kernels.so"))
        path = folder / f"cpu_kernels-{key.hexdigest()[:20]}.so"
        if path.exists():
            with contextlib.suppress(OSError):  # what a crash may have cut short
                return _open(path)
        return _open(_compile(compiler, path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"the C kernels cannot be compiled or loaded, work on the CPU is slower: {detail}", stacklevel=2)
        return None


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, signature in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [*(TYPES[letter] for letter in signature), ctypes.c_int], None
    library.space_size.argtypes, library.space_size.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return library


def _processor() -> bytes:
    """What -march=native looks at: a home folder may be shared by hosts with other processors."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return b"".join(line for line in dict.fromkeys(lines) if line.lower().startswith((b"flags", b"model", b"features")))


def _cache_folder() -> Path | None:
    """A folder that only this user can write to; None where there is none."""
    base = os.environ.get("PPOMAX_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ppomax"
    )
    try:
        os.makedirs(base, mode=0o700, exist_ok=True)
        status = os.stat(base)
    except OSError:
        return None
    is_private = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return Path(base).absolute() if is_private and os.access(base, os.W_OK) else None


def _compile(compiler: str, path: Path) -> Path:
    """Compiles to `path`, which appears when it is complete: several processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [os.path.join(scratch, f"{source.stem}.o") for source in SOURCES]
        library = os.path.join(scratch, "k.so")
        # OpenMP's functions are those that torch has loaded: linked once more, they would bring threads of their own.
        compile_all = [
            [*FLAGS, "-fopenmp", "-fPIC", "-c", str(source), "-o", object_]
            for source, object_ in zip(SOURCES, objects, strict=True)
        ]
        for arguments in (*compile_all, ["-shared", *objects, "-o", library]):
            command = [compiler, *arguments]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS)
        os.replace(library, path)
    return path
