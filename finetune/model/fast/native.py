"""Compile kernels.c for this machine, once: the C compiler found in, a loaded library or the reason for none out."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from finetune.machine import cache_folder

SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
WIDE = ("-mprefer-vector-width=512",)  # x86 only: compilers prefer half of what the machine has
OTHERS_WRITE = stat.S_IWOTH | stat.S_IWGRP
DIGEST_BYTES = 32
COMPILE_SECONDS = 120


class Unavailable(Exception):
    """Why there is no compiled library; everything goes on with torch."""


def load_library(*, compilers: Sequence[str] = COMPILERS, source: Path = SOURCE) -> ctypes.CDLL:
    """The compiled kernels, from the cache or made now.

    A file in the cache is a shared library and then its SHA-256, so that a damaged one is seen before it is mapped.

    Raises:
        Unavailable: another system than Linux, no compiler or OpenMP runtime, a failed compile, or a cache others can
            write to.
    """
    if sys.platform != "linux":
        raise Unavailable(f"kernels are compiled on Linux only, not on {sys.platform}")
    compiler = next((path for path in map(shutil.which, compilers) if path), None)
    if compiler is None:
        raise Unavailable(f"no C compiler was found ({', '.join(compilers)})")
    runtime = openmp_runtime()
    flags = FLAGS + (WIDE if platform.machine() == "x86_64" else ())
    try:
        code = source.read_bytes()
        folder = private_folder(cache_folder() / "kernels")
        file = folder / f"{_key(code, flags, compiler, runtime)}.so"
        if not _is_whole(file):
            _compile(code, file, command=(compiler, *flags), runtime=runtime)
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(str(error)) from error


def openmp_runtime() -> Path:
    """The file of the OpenMP runtime torch computes with; a second one in the same process would fight for the cores.

    Raises:
        Unavailable: this torch has none that a C compiler's code could call.
    """
    torch_file = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        entry = ctypes.CDLL(str(torch_file), mode=os.RTLD_NOLOAD).GOMP_parallel  # looked up as torch's own code does
    except (OSError, AttributeError) as error:
        raise Unavailable("torch has no OpenMP runtime to share") from error
    address = ctypes.cast(entry, ctypes.c_void_p).value or 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        first, end = (int(part, 16) for part in span.split("-"))
        if first <= address < end:
            return Path(name)
    raise Unavailable("torch's OpenMP runtime is no file")


def private_folder(folder: Path) -> Path:
    """The folder, made where it was missing; what is loaded from it runs as this user, so nobody else may write there.

    Raises:
        Unavailable: it, or a folder above it, can be changed by somebody else.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    for each in (folder, *folder.parents):
        facts = each.stat()
        if facts.st_uid not in {os.geteuid(), 0}:
            raise Unavailable(f"{each} belongs to another user; compiled code is not loaded from there")
        own_group = facts.st_gid == os.getegid() == os.geteuid()  # a group of this user alone, by convention
        open_to_others = facts.st_mode & (stat.S_IWOTH if own_group else OTHERS_WRITE)
        # In a folder with the sticky bit, such as /tmp, others cannot replace what is ours.
        if open_to_others and not (facts.st_mode & stat.S_ISVTX and each != folder):
            raise Unavailable(f"others can write to {each}; compiled code is not loaded from there (chmod go-w)")
    return folder


def _key(code: bytes, flags: Sequence[str], compiler: str, runtime: Path) -> str:
    """One name for the same result: the compiler's predefined macros tell its version and what this CPU can do."""
    command = [compiler, *flags, "-dM", "-E", "-x", "c", os.devnull]
    macros = subprocess.run(command, capture_output=True, timeout=COMPILE_SECONDS, check=True).stdout
    parts = [code, macros, *(str(each).encode() for each in (flags, compiler, runtime))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _is_whole(file: Path) -> bool:
    """Whether the file is there, ours, and what was once written, by its own digest."""
    try:
        content, facts = file.read_bytes(), file.lstat()
    except FileNotFoundError:
        return False
    if facts.st_uid != os.geteuid() or not stat.S_ISREG(facts.st_mode) or facts.st_mode & OTHERS_WRITE:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _compile(code: bytes, file: Path, *, command: Sequence[str], runtime: Path) -> None:
    """Compile into the cache; several processes may do so at once, and each ends with a whole file in place."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="making-") as name:
        work = Path(name)
        (work / "kernels.c").write_bytes(code)
        # Linked apart: with -fopenmp the linker would add the system's own OpenMP runtime.
        _run([*command, "-c", "kernels.c", "-o", "kernels.o"], work)
        _run([command[0], "-shared", "-Wl,--no-undefined", "kernels.o", str(runtime), "-lm", "-o", "kernels.so"], work)
        library = (work / "kernels.so").read_bytes()
        whole = work / "whole.so"
        whole.write_bytes(library + hashlib.sha256(library).digest())
        whole.chmod(0o700)
        whole.replace(file)


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=COMPILE_SECONDS, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in said if "error" in line or "undefined" in line), said[0])
        raise Unavailable(f"{command[0]} could not compile the kernels: {first}")
