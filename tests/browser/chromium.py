"""A Chromium for the tests of the report: `chromium.py install` has Debian's package manager bring one, if root may."""

import os
import shutil
import subprocess
import sys
from ctypes.util import find_library

NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")


def find_chromium() -> str | None:
    """Return the path of a browser that Playwright can drive, if one is there."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


def install() -> int:
    """Bring a browser; return 3 where that cannot be done here."""
    # Playwright brings a Node.js of its own, which needs a library that a bare machine has not.
    if find_chromium() and find_library("atomic"):
        return 0
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print("No browser for the tests of the report: install Chromium, or run as root on Debian or Ubuntu")
        return 3
    print("Installing chromium ...", flush=True)
    quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    subprocess.run(["apt-get", "update", "-qq"], check=False, **quiet)  # type: ignore[call-overload]
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "libatomic1"]
    done = subprocess.run(command, check=False, **quiet)  # type: ignore[call-overload]
    return 0 if done.returncode == 0 and find_chromium() else 3


if __name__ == "__main__":
    sys.exit(install() if sys.argv[1:] == ["install"] else 2)
