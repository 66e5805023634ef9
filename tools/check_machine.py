"""Before anything is installed: is Python new enough, and how much will be downloaded? Needs nothing but Python."""

import platform
import shutil
import sys
from pathlib import Path

CUDA_DOWNLOAD_GB = 3.5  # torch 2.13.0 for Linux from PyPI with the CUDA libraries it requires
CPU_DOWNLOAD_GB = 0.2


def main() -> None:
    """Exit 2 with the cure if the machine cannot be set up; warn before a large download."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before anything has checked it
        sys.exit(f"Python 3.11 or newer is needed, this is {platform.python_version()}; try make PYTHON=python3.11")
    venv = Path(sys.argv[1])
    if any(venv.glob("lib/python*/site-packages/torch")):
        return
    if platform.system() == "Linux" and not shutil.which("nvidia-smi"):
        print(
            f"No NVIDIA GPU found. PyTorch's default build for Linux downloads about {CUDA_DOWNLOAD_GB} GB of CUDA "
            f"libraries; its CPU build {CPU_DOWNLOAD_GB} GB. To take the CPU build, stop this with Ctrl-C and add\n"
            '  PIP_ARGS="--extra-index-url <the CPU address from pytorch.org, Get started>"\n'
            "to the make command. Where pip is set up to find a CPU build already, nothing is to be done.",
            flush=True,
        )


main()
