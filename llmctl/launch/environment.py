"""The environment of a stage's process: an allow-list of the runner's, then what the spec declares."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

NAMES = frozenset(
    ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TMP", "TEMP", "VIRTUAL_ENV")
    + ("CONDA_PREFIX", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
    + ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy")
)
PREFIXES = (
    "LC_", "PYTHON", "LD_", "DYLD_", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH",
    "PYTORCH_", "ORT_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "LLMCTL_", "XDG_", "SLURM_", "GLOO_", "OTEL_",
)  # fmt: skip
PRIVATE = ("_TOKEN", "_KEY", "_SECRET", "_PASSWORD", "_HEADERS")
"""Ends of names that are not let through by their prefix: what opens a door must be declared by the stage that needs
it."""
FIXED = {
    # Iteration order of sets of strings must not differ between two runs of one stage.
    "PYTHONHASHSEED": "0",
    # The fork warning of tokenizers is noise: a stage that wants threads asks for them.
    "TOKENIZERS_PARALLELISM": "false",
    # A print is in the log even if the process is killed right after it.
    "PYTHONUNBUFFERED": "1",
}
DEFAULTS = {
    # Waiting threads sleep. By default they spin, and beside any other work on the machine a training step then takes
    # several times as long: each barrier waits for a thread that another one's spinning keeps off its core.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def stage_environment(
    declared: Mapping[str, str],
    cpus: int | None = None,
    devices: Sequence[str] | None = None,
    base: Mapping[str, str] | None = None,
    hidden: Collection[str] = (),
) -> dict[str, str]:
    """What the stage sees: allowed variables of `base` (this process), defaults, fixed ones, resources, declared
    ones last.

    `devices` are the GPUs it was given, None if it asked for none in particular. `hidden` are variables that hold
    secrets: like those that are called so (`HF_TOKEN`), only a stage that declares them gets them.
    """
    source = os.environ if base is None else base
    allowed = {
        name: value
        for name, value in source.items()
        if (name in NAMES or (name.startswith(PREFIXES) and not name.endswith(PRIVATE))) and name not in hidden
    }
    limits: dict[str, str] = {}
    if cpus is not None:
        limits |= {"OMP_NUM_THREADS": str(cpus), "MKL_NUM_THREADS": str(cpus)}
    if devices is not None:
        limits["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return {**DEFAULTS, **allowed, **FIXED, **limits, **declared}
