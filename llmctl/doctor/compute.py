"""Checks of what computes: driver and GPU, torch, ONNX Runtime. Only experiments count, not what is listed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llmctl.doctor.finding import Finding
from llmctl.doctor.world import World

KERNEL = "/proc/driver/nvidia/version"
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""By the major version of CUDA (CUDA compatibility guide, minor version compatibility on Linux)."""
WHEELS = "https://download.pytorch.org/whl"
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


def driver(world: World) -> Iterator[Finding]:
    """NVIDIA's driver and the GPUs behind it."""
    kernel = re.search(r"Kernel Module\b.*?\b(\d{3,}\.[\d.]+)", world.read(KERNEL))
    names = world.gpus
    if names:
        yield Finding(
            "gpu", "ok", f"{', '.join(names)}; driver {'.'.join(map(str, driver_version(world) or ())) or '?'}"
        )
    elif kernel:
        answer = world.run(("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"))
        said = (answer.text.strip().splitlines() or ["it prints nothing"])[0]
        if "mismatch" in said:
            yield Finding("gpu", "problem", f"driver {kernel[1]} is not the one of its library: {said}", "sudo reboot")
        else:
            fix = "docker run --gpus all …, or reinstall the driver" if answer.code is None else "nvidia-smi"
            yield Finding("gpu", "problem", f"driver {kernel[1]} is loaded, nvidia-smi fails: {said}", fix)
    else:
        yield Finding("gpu", "ok", "no NVIDIA GPU; everything runs on the CPU")


def driver_version(world: World) -> tuple[int, int] | None:
    """(580, 65) of the driver, from the kernel or from nvidia-smi."""
    answer = world.run(("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))
    text = answer.text if answer.code == 0 else world.read(KERNEL)
    found = re.search(r"\b(\d{3,})\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def torch(world: World) -> Iterator[Finding]:
    """Whether torch can be imported and computes, on the GPU if there is one."""
    dist = world.has("torch")
    if dist is None:
        return  # what that disables is among the extras
    probe = world.probe("torch")
    if probe.fault:
        text = f"{dist.version} does not work: {probe.fault}"
        yield Finding(
            "torch", "problem", text, f"{world.pip} install --force-reinstall --no-deps torch=={dist.version}"
        )
        return
    if not probe.values["cpu"]:
        text = f"{dist.version} computes a wrong product of matrices"
        yield Finding("torch", "problem", text, f"{world.pip} install --force-reinstall torch")
        return
    build = f"built for CUDA {probe.values['cuda']}" if probe.values["cuda"] else "CPU build"
    gpus, version = world.gpus, driver_version(world)
    if not gpus:
        yield Finding("torch", "ok", f"{dist.version}, {build}, computes on the CPU")
    elif not probe.values["cuda"]:
        yield Finding(
            "torch", "warning", f"{dist.version} is a CPU build, {gpus[0]} stays idle", _wheel(world, version)
        )
    elif probe.values.get("gpu"):
        yield Finding("torch", "ok", f"{dist.version}, {build}, computes on {probe.values.get('device', gpus[0])}")
    elif (oldest := OLDEST_DRIVER.get(int(probe.values["cuda"].partition(".")[0]))) and version and version < oldest:
        text = (
            f"{dist.version} is {build}, which needs driver {oldest[0]}.{oldest[1]}; {version[0]}.{version[1]} is here"
        )
        yield Finding("torch", "problem", text, _wheel(world, version))
    else:
        said = probe.values.get("error") or "its product of matrices is wrong"
        yield Finding(
            "torch", "problem", f"{dist.version}, {build}, fails on {gpus[0]}: {said}", _wheel(world, version)
        )


def _wheel(world: World, version: tuple[int, int] | None) -> str:
    """The newest build of torch that the driver can run."""
    if version and version < OLDEST_DRIVER[12]:
        return "install a driver of 525.60 or newer from https://www.nvidia.com/drivers"
    wheel = "cu130" if version and version >= OLDEST_DRIVER[13] else "cu126"
    return f"{world.pip} install --force-reinstall torch --index-url {WHEELS}/{wheel}"


def onnxruntime(world: World) -> Iterator[Finding]:
    """Which providers can really be used. Listed is every one that was compiled in, be there a GPU or not."""
    dist = world.has("onnxruntime-gpu") or world.has("onnxruntime")
    if dist is None:
        return
    probe = world.probe("onnxruntime")
    again = f"{world.pip} install --force-reinstall --no-deps {dist.name}"
    if probe.fault:
        yield Finding("onnxruntime", "problem", f"{dist.name} {dist.version} does not work: {probe.fault}", again)
        return
    providers = probe.values["providers"]
    if providers.get(CPU, "is not listed"):
        yield Finding("onnxruntime", "problem", f"the CPU provider fails: {providers.get(CPU, 'not listed')}", again)
        return
    usable = [name.removesuffix("ExecutionProvider") for name, fault in providers.items() if fault is None]
    if not world.gpus or providers.get(CUDA, "") is None:
        yield Finding("onnxruntime", "ok", f"{dist.name} {dist.version}, usable: {', '.join(usable)}")
    elif CUDA in providers:
        text = f"{dist.name} {dist.version} lists CUDA and cannot load it: {providers[CUDA]}"
        yield Finding("onnxruntime", "problem", text, f"{world.pip} install 'onnxruntime-gpu[cuda,cudnn]'")
    else:
        fix = f"{world.pip} uninstall -y onnxruntime && {world.pip} install 'onnxruntime-gpu[cuda,cudnn]'"
        text = f"{dist.name} {dist.version} is a CPU build, {world.gpus[0]} stays idle"
        yield Finding("onnxruntime", "warning", text, fix)
