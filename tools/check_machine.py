"""Before anything is installed: is Python new enough, and how much will be downloaded? Needs nothing but Python."""

import platform
import shutil
import sys
from pathlib import Path


def main() -> None:
    """Exit 2 with the cure if the machine cannot be set up; warn before a large download."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything has checked it
        sys.exit(f"Python 3.11 or newer is needed, this is {platform.python_version()}; try make PYTHON=python3.11")
    venv = Path(sys.argv[1])
    if any(venv.glob("lib/python*/site-packages/torch")):
        return
    if platform.system() != "Linux":
        return
    print("PyTorch's default build for Linux brings several GB of CUDA libraries; more than 1 GB may be downloaded.")
    if not shutil.which("nvidia-smi"):
        print(
            "No NVIDIA GPU was found, so its CPU build (about 0.2 GB) is enough: stop this and repeat it with\n"
            '  PIP_ARGS="--extra-index-url ADDRESS"\n'
            'where ADDRESS is the CPU address of "Get started" on pytorch.org. Where pip finds a CPU build already, '
            "nothing is to be done."
        )
    sys.stdout.flush()


main()
