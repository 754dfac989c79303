"""Set up .venv for this checkout: `python3 tools/setup.py EXTRA[,EXTRA…]`. Called by make.

Standard library only, and readable by old Pythons, so that an unsupported one gets a sentence instead of a traceback.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if sys.platform == "win32" else "bin")
LOG = VENV / "setup.log"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
OLDEST, NEWEST = (3, 11), (3, 13)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # torch's own index of CPU builds


def fail(message, hint, code=7):
    """Print one line and the way out, then exit."""
    sys.stderr.write("error: {}\n  hint: {}\n".format(message, hint))
    sys.exit(code)


def check_python():
    """Refuse a Python that the pinned wheels do not exist for."""
    have = sys.version_info[:2]
    if not OLDEST <= have <= NEWEST:
        name = "{}.{}".format(*have)
        span = "{}.{} to {}.{}".format(*(OLDEST + NEWEST))
        fail(
            "Python {} is not supported, llmctl needs {}".format(name, span),
            "install one of them and run: make PYTHON=python3.11 quickstart",
        )


def make_venv():
    """Create the virtual environment, or explain what is missing for it."""
    if (BIN / "python").exists() and subprocess.call(
        [str(BIN / "python"), "-m", "pip", "--version"], stdout=subprocess.DEVNULL
    ) == 0:
        return
    try:
        import ensurepip  # noqa: F401  # Debian ships venv without it
        import venv
    except ImportError:
        package = "python{}.{}-venv".format(*sys.version_info[:2])
        fail("this Python has no working `venv` module", "install it, for example: sudo apt-get install " + package)
    sys.stderr.write("creating {}\n".format(VENV))
    venv.EnvBuilder(with_pip=True, clear=VENV.exists(), symlinks=sys.platform != "win32").create(str(VENV))


def pip(what, arguments, required=True):
    """Run pip with its chatter in the log; say what happens in one line. True if it worked."""
    sys.stderr.write("{} …\n".format(what))
    with LOG.open("a", encoding="utf-8") as log:
        log.write("\n== pip install {}\n".format(" ".join(arguments)))
        log.flush()
        command = [str(BIN / "python"), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        code = subprocess.call(command, stdout=log, stderr=log, cwd=str(ROOT))
    if code and required:
        tail = LOG.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        sys.stderr.write("".join("    {}\n".format(line) for line in tail))
        fail("{} failed".format(what), "read {}, mend the cause, run make again (it goes on from here)".format(LOG))
    return code == 0


def has_nvidia_driver():
    """Whether the NVIDIA kernel driver is loaded, which decides the build of torch."""
    return Path("/proc/driver/nvidia/version").exists() or sys.platform == "win32"


def installed_torch():
    """The version of torch in the environment, empty if there is none."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    run = subprocess.run(
        [str(BIN / "python"), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    )
    return run.stdout.decode().strip()


def install_torch():
    """Take a CPU build where there is no NVIDIA driver and one can be had; return the constraints to go on with."""
    pins = ["-c", "constraints.txt"]
    cpu = pins + ["-c", "constraints-cpu.txt"]
    if has_nvidia_driver():
        pip("installing torch (an NVIDIA driver is there: the CUDA build)", pins + ["torch"])
        return pins
    if installed_torch() or pip("installing torch (no NVIDIA driver: a CPU build)", cpu + ["torch"], required=False):
        return cpu if "+cpu" in installed_torch() or sys.platform != "linux" else pins
    if pip("looking for a CPU build at " + CPU_INDEX, cpu + ["--extra-index-url", CPU_INDEX, "torch"], required=False):
        return cpu
    pip("no CPU build can be had here: installing the CUDA build of torch (several GB)", pins + ["torch"])
    return pins


def install_browser():
    """Take Debian's chromium for the tests of the chat page, where apt may be used; without one they are skipped."""
    if any(shutil.which(name) for name in BROWSERS):
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", BROWSERS[0]]
    if not (shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0):
        sys.stderr.write("no chromium: the chat page is not tested (as root: {})\n".format(" ".join(command)))
        return
    sys.stderr.write("installing chromium (for the tests of the chat page) …\n")
    with LOG.open("a", encoding="utf-8") as log:
        for words in (["apt-get", "update"], command):
            try:
                code = subprocess.call(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=300)
            except subprocess.TimeoutExpired:
                code = 1
    if code:
        sys.stderr.write("chromium cannot be had here: the chat page is not tested\n")


def main():
    """Set up and say what was taken."""
    check_python()
    make_venv()
    extras = sys.argv[1] if len(sys.argv) > 1 else "all"
    constraints = install_torch()
    pip("installing llmctl[{}]".format(extras), constraints + ["-e", ".[{}]".format(extras)])
    if "test-browser" in extras.split(","):
        install_browser()
    sys.stderr.write("ready: torch {}, {}\n".format(installed_torch(), BIN / "llmctl"))


if __name__ == "__main__":
    main()
