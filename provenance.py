"""What a result was made with: the versions of Python and of packages, and this project's commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    *("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "segmentation-models-pytorch"),
    *("numpy", "opencv-python-headless", "pillow", "webdataset"),
)
"""Those that results depend on, in value or in speed."""


def find_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def find_commit() -> str | None:
    """Return the checkout's git commit, with a `+` where its files differ from it; None outside of git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    status = [*git, "status", "--porcelain", "--untracked-files=no"]
    changes = subprocess.run(status, capture_output=True, text=True, check=False).stdout
    return (commit + "+" * bool(changes.strip())) or None
