"""Make a virtual environment of pinned requirements, or add packages to one that is there.

    python3 scripts/make_venv.py .venv/train -r envs/train.txt         # removes what lies there, and makes it anew
    python3 scripts/make_venv.py --add .venv/train -r envs/test.txt    # the installer is given what follows the folder

uv installs where it can be had: the one on the path, or else one that pip brings into `.venv/uv`. Files that several
environments share then lie on the disk once. Without uv, pip installs. Both follow pip's variables and configuration.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN_UV = ROOT / ".venv/uv"
CACHE = ROOT / ".venv/uv-cache"

# The first release of uv that has all options below.
OLDEST_UV = (0, 5)

# What uv calls those options of pip's that its configuration may set.
UV_OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
    "only-binary": "--only-binary",
    "no-binary": "--no-binary",
}
UV_FLAGS = {"no-index": "--no-index", "pre": "--prerelease=allow", "require-hashes": "--require-hashes"}

# The variables that tell uv what pip has further options for.
UV_VARIABLES = {
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
    "proxy": "ALL_PROXY",
}

# What is installed names the clone's path, which may have letters that the shell's language lacks.
LOCALE = {"LC_ALL": "C.UTF-8"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", action="store_true", help="add to the environment that is there")
    parser.add_argument("directory", type=Path, help="of the environment")
    arguments, packages = parser.parse_known_args()
    python, directory = find_python(), arguments.directory
    installed = directory / "bin/python"
    uv = find_uv(python)
    settings = read_pip_settings(python) if uv else {}
    if not arguments.add:
        print(f"Installing {' '.join(packages[1:])} into {directory} ({'uv' if uv else 'pip'}) ...", flush=True)
        (directory / "installed").unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        if uv:
            run([uv, "venv", "--quiet", "--python", python, directory], make_uv_environment(settings))
            # For people who add a package of their own.
            packages.append("pip")
        else:
            run([python, "-m", "venv", directory])
    if uv:
        command = [uv, "pip", "install", "--quiet", "--python", installed, *packages, *list_uv_options(settings)]
        # Without bytecode a start takes three times as long. Python writes that of what it imports, unless told not to.
        command += ["--compile-bytecode"] if os.environ.get("PYTHONDONTWRITEBYTECODE") else []
        run(command, make_uv_environment(settings))
    else:
        command = [installed, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        run(command, make_pip_environment())
    if "--editable" in packages:
        name_relatively(directory)
    if not arguments.add:
        # Last, since the environment is complete only now.
        (directory / "installed").touch()


def name_relatively(directory):
    """Have an environment find the package by its path from there.

    Python reads that path in the shell's language, and does not start where the language lacks a letter of it.
    """
    for file in directory.glob("lib/python3*/site-packages/__editable__.*.pth"):
        folders = file.read_text(encoding="utf-8").split("\n")
        relative = [
            os.path.relpath(folder, file.parent.resolve()) if os.path.isabs(folder) else folder for folder in folders
        ]
        file.write_text("\n".join(relative), encoding="utf-8")


def find_python():
    """Return the path of this Python, outside of any environment, once it has what it takes to make one.

    Exits with a message where it is too old, or lacks `venv` and cannot be given it.
    """
    version = "{}.{}".format(*sys.version_info)
    if sys.version_info < (3, 11):  # noqa: UP036 - whatever Python the user has runs this
        sys.exit(
            f"lorasweep needs Python 3.11 or later, and {sys.executable} is Python {version}. "
            "Name another one: make PYTHON=python3.12 ..."
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        # Debian and Ubuntu ship Python without it.
        package = f"python{version}-venv"
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            sys.exit(f"{sys.executable} lacks the module venv. Install it: sudo apt-get install {package}")
        print(f"Installing {package} ...", flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "-qq", "update"], environment)
        run(["apt-get", "-qq", "-y", "install", "--no-install-recommends", package], environment, subprocess.DEVNULL)
    # Where an environment is active this script runs in it, and it may be about to be removed.
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def find_uv(python):
    """Return the path of uv, or None where it cannot be had."""
    there = shutil.which("uv")
    if there and read_version(there) >= OLDEST_UV:
        return there
    own = OWN_UV / "bin/uv"
    if (OWN_UV / "installed").exists() and own.exists():
        return own
    shutil.rmtree(OWN_UV, ignore_errors=True)
    run([python, "-m", "venv", OWN_UV])
    pip = [OWN_UV / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command = [*map(str, pip), "--only-binary=uv", "-r", str(ROOT / "envs/uv.txt")]
    done = subprocess.run(command, env=make_pip_environment(), stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gives no reason"])[-1]
        print(f"uv cannot be had here ({reason}): pip installs, which takes longer and more room.", flush=True)
        return None
    (OWN_UV / "installed").touch()
    return own


def read_version(uv):
    said = subprocess.run([uv, "--version"], stdout=subprocess.PIPE, text=True).stdout
    numbers = re.search(r"(\d+)\.(\d+)", said)
    return tuple(map(int, numbers.groups())) if numbers else (0, 0)


def read_pip_settings(python):
    """Return what pip's variables and configuration files set for an installation, by the option's name."""
    command = [python, "-m", "pip", "config", "list"]
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    settings = {}
    # As in pip, a value of a section takes the place of one of the section before.
    for section in ("global", "install", ":env:"):
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.*)$", said, flags=re.MULTILINE):
            settings[name] = str(ast.literal_eval(value))
    return settings


def list_uv_options(settings):
    """Return the options that have uv install what pip would install by its settings."""
    # pip chooses the best of what all indexes have, uv else takes what the first has.
    options = ["--index-strategy", "unsafe-best-match"]
    for name, option in UV_OPTIONS.items():
        for value in re.split(r"[\s,]+" if name.endswith("binary") else r"\s+", settings.get(name, "").strip()):
            options += [option, value] if value else []
    for name, flag in UV_FLAGS.items():
        options += [flag] if settings.get(name, "").lower() in ("1", "true", "yes", "on") else []
    return options


def make_uv_environment(settings):
    """Return the variables that uv is given; those that are set for uv itself stay."""
    # In the clone, as all that is installed: homes have quotas.
    environment = {"UV_CACHE_DIR": str(CACHE), "UV_PYTHON_DOWNLOADS": "never"}
    environment |= {variable: settings[name] for name, variable in UV_VARIABLES.items() if name in settings}
    return {**environment, **os.environ, **LOCALE}


def make_pip_environment():
    """Return the variables that pip is given: none that has it install elsewhere than into the environment."""
    elsewhere = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
    return {**{name: value for name, value in os.environ.items() if name not in elsewhere}, **LOCALE, "PIP_USER": "0"}


def run(command, environment=None, output=None):
    """Run a command; end with its exit status where it fails."""
    done = subprocess.run(list(map(str, command)), env=environment, stdout=output)
    if done.returncode:
        print(f"Failed with status {done.returncode}: {' '.join(map(str, command[:4]))} ...", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
