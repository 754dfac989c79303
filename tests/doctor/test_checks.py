"""Every finding of `llmctl doctor` in a made-up world, one change away from a healthy one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmctl import __version__
from llmctl.doctor import compute, machine, packages, request
from llmctl.doctor.commands import as_json, as_text, checks, doctor
from llmctl.doctor.finding import Finding, examine
from llmctl.doctor.world import Dist, Output, Probe, World, kernel_gpus, normal, tried_versions
from llmctl.errors import InputError, MachineError, UsageError
from llmctl.launch.secrets import names_of, resolve
from llmctl.pipeline import machine as pipeline_machine
from llmctl.pipeline.machine import check_resources, memory_limit
from llmctl.pipeline.selection import select
from llmctl.registry import Failure
from llmctl.spec.resolved import EnvValue, Pipeline, Resources, Secret, StageSpec

LLMCTL = Dist(
    "llmctl",
    __version__,
    (
        "click>=8.2",
        "onnxruntime-gpu>=1.31.1",
        "not a requirement at all",
        'torch>=2.11; extra == "train"',
        'transformers<4.58,>=4.57; extra == "optimum"',
        'scipy>=1.15; extra == "eval"',
    ),
)
MOUNTS = """
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:5 / /mnt/a\\040b rw - nfs4 server:/x rw
24 22 0:6 / /mnt rw - xfs /dev/sdb rw
"""
FILES = {
    "/proc/meminfo": "MemTotal:       16777216 kB\n",
    "/proc/self/cgroup": "0::/user/me\n",
    "/proc/self/mountinfo": MOUNTS,
}
PLACE = {"skew": 0.0, "case": True, "rename": True, "link": True, "flock": True, "fsync": True}
PROBES = {
    "torch": Probe({"version": "2.13.0+cpu", "cuda": None, "available": False, "cpu": True}),
    "onnxruntime": Probe({"version": "1.31.1", "providers": {"CPUExecutionProvider": None}}),
    "place": Probe(PLACE),
    "temporary": Probe({"directory": "/tmp", "exec": True}),
}


def dists(*rows):
    return {normal(row.name): row for row in rows}


STAGE = SimpleNamespace(name="sft", extra="train")
INSTALLED = (
    LLMCTL,
    Dist("click", "8.5.1"),
    Dist("torch", "2.13.0+cpu"),
    Dist("transformers", "4.57.6", ("huggingface-hub<1.0,>=0.34",)),
    Dist("huggingface-hub", "0.36.2"),
    Dist("optimum-onnx", "0.1.0"),
    Dist("scipy", "1.17"),
    Dist("onnxruntime-gpu", "1.31.1"),
)


def registry(**changes):
    values = {
        "stages": {"sft": STAGE},
        "failures": {},
        "unknown_disabled": (),
        "plugins": (),
        "origin": lambda name: SimpleNamespace(dist="llmctl"),
    }
    return SimpleNamespace(**{**values, **changes})


def healthy(**changes) -> World:
    """A machine without a GPU on which everything is well."""
    values = {
        "python": (3, 12, 1),
        "executable": "/env/bin/python",
        "isolated": True,
        "environ": {},
        "distributions": dists(*INSTALLED),
        "tried": {},
        "registry": registry(),
        "read": lambda path: FILES.get(path, ""),
        "which": lambda name: f"/env/bin/{name}" if name == "pip" else f"/usr/bin/{name}",
        "run": lambda command: Output(None, "No such file or directory"),
        "probe": PROBES.__getitem__,
        "store": Path("/home/me/store"),
        "free": 100 << 30,
        "cores": 4,
        "affinity": 4,
        "open_files": 4096,
        "encoding": "UTF-8",
        "now": 1_790_000_000.0,
        "fits": lambda stage: check_resources([stage], Path("/")),
        "secret": lambda secret: resolve({secret.name: secret}, [secret.name]),
    }
    return World(**{**values, **changes})


def files(**changes):
    known = {**FILES, **{path.replace("__", "/"): text for path, text in changes.items()}}
    return lambda path: known.get(path, "")


def probes(**changes):
    return {**PROBES, **changes}.__getitem__


def place(**changes):
    return probes(place=Probe({**PLACE, **changes}))


def gpu(driver="580.65.06", name="NVIDIA H100"):
    """What nvidia-smi says of one GPU."""
    return lambda command: Output(0, f"{driver if 'driver' in command[1] else name}\n")


def with_dists(*rows, without=()):
    kept = {name: dist for name, dist in dists(*INSTALLED).items() if name not in without}
    return {**kept, **dists(*rows)}


def test_a_healthy_world_has_nothing_to_do():
    found = examine(checks(), healthy())
    assert {row.state for row in found} == {"ok"}
    assert as_text(found).endswith("\nnothing to do")
    assert not [row for row in found if row.fix]


CUDA_TORCH = Probe({"version": "2.13.0", "cuda": "13.0", "available": True, "cpu": True, "gpu": True, "device": "H100"})
NO_GPU_TORCH = Probe({"version": "2.13.0", "cuda": "13.0", "available": False, "cpu": True, "error": "no kernel image"})
CUDA_FAILS = Probe({"providers": {"CUDAExecutionProvider": "libcudnn.so.9 is missing", "CPUExecutionProvider": None}})
CUDA_WORKS = Probe({"providers": {"CUDAExecutionProvider": None, "CPUExecutionProvider": None}})
BROKEN = Failure(name="acme", reason="the plugin is broken: boom", hint="uninstall acme", exit_code=7)
ON_GPU = {"run": gpu(), "distributions": with_dists(Dist("torch", "2.13.0"))}

WORLDS = [
    # check, state, what is said, what mends it, the change
    ("python", "problem", "3.10.2", "python3.11 -m venv", {"python": (3, 10, 2)}),
    ("python", "warning", "no virtual environment", "-m venv .venv", {"isolated": False}),
    ("llmctl", "problem", "is not installed", "pip install -e .", {"distributions": with_dists(without=("llmctl",))}),
    (
        "llmctl",
        "problem",
        "the installation says 0.0.1",
        "pip install -e /src",
        {"distributions": with_dists(Dist("llmctl", "0.0.1", LLMCTL.requires, "/src"))},
    ),
    (
        "onnxruntime-packages",
        "problem",
        "onnxruntime and onnxruntime-gpu overwrite each other's files",
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        {"distributions": with_dists(Dist("onnxruntime", "1.31.1"))},
    ),
    (
        "onnxruntime-packages",
        "problem",
        "none is installed",
        "pip install onnxruntime-gpu",
        {"distributions": with_dists(without=("onnxruntime-gpu",))},
    ),
    (
        "cpu-build",
        "problem",
        "torchvision 0.28.0 is a CUDA build beside torch 2.13.0+cpu",
        "pip uninstall -y torchvision",
        {"distributions": with_dists(Dist("torchvision", "0.28.0"))},
    ),
    (
        "cpu-build",
        "warning",
        "triton 3.7.1 is of no use",
        "pip uninstall -y triton",
        {"distributions": with_dists(Dist("triton", "3.7.1"))},
    ),
    (
        "conflicts",
        "problem",
        "transformers 4.57.6 beside huggingface-hub 1.5",
        "pip install 'huggingface-hub>=0.34,<1.0'",
        {"distributions": with_dists(Dist("huggingface-hub", "1.5"))},
    ),
    (
        "conflicts",
        "problem",
        "transformers 5.17.0 beside huggingface-hub 0.36.2",
        "pip install 'huggingface-hub>=1.5,<2'",
        {"distributions": with_dists(Dist("transformers", "5.17.0"))},
    ),
    (
        "conflicts",
        "problem",
        "optimum-onnx 0.1.0 beside transformers 5.17.0",
        "pip install 'transformers>=4.57,<4.58'",
        {"distributions": with_dists(Dist("transformers", "5.17.0"), Dist("huggingface-hub", "1.6"))},
    ),
    (
        "conflicts",
        "problem",
        "datatrove 0.9.0 beside xxhash 4.0",
        "pip install 'xxhash<4'",
        {"distributions": with_dists(Dist("datatrove", "0.9.0"), Dist("xxhash", "4.0"))},
    ),
    (
        "conflicts",
        "problem",
        "evidently 0.7.23 beside pandas 3.1.1",
        "pip install 'pandas<3'",
        {"distributions": with_dists(Dist("evidently", "0.7.23"), Dist("pandas", "3.1.1"))},
    ),
    (
        "conflicts",
        "problem",
        f"llmctl {__version__} needs click>=8.2, 8.0 is installed",
        "pip install 'click>=8.2'",
        {"distributions": with_dists(Dist("click", "8.0"))},
    ),
    (
        "conflicts",
        "problem",
        "alt-profanity-check 1.9.1 needs joblib==1.6.0, 1.5 is installed",
        "pip install 'joblib==1.6.0'",
        {"distributions": with_dists(Dist("alt-profanity-check", "1.9.1", ("joblib==1.6.0",)), Dist("joblib", "1.5"))},
    ),
    (
        "extras",
        "warning",
        "[train] lacks torch: no sft",
        "pip install 'llmctl[train]'",
        {"distributions": with_dists(without=("torch",))},
    ),
    (
        "extras",
        "warning",
        "[train] lacks torch>=2.11 (not 2.5)",
        "pip install -e '/src[train]'",
        {"distributions": with_dists(Dist("llmctl", __version__, LLMCTL.requires, "/src"), Dist("torch", "2.5"))},
    ),
    (
        "plugins",
        "problem",
        "acme: the plugin is broken",
        "uninstall acme",
        {"registry": registry(failures={"acme": BROKEN})},
    ),
    ("plugins", "warning", "no installed plugin: ghost", "unset", {"registry": registry(unknown_disabled=("ghost",))}),
    (
        "gpu",
        "problem",
        "driver 535.129.03 is not the one of its library: Failed to initialize NVML",
        "sudo reboot",
        {
            "read": files(
                __proc__driver__nvidia__version="NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  X"
            ),
            "run": lambda command: Output(18, "Failed to initialize NVML: Driver/library version mismatch\n"),
        },
    ),
    (
        "gpu",
        "problem",
        "driver 535.129.03 is loaded, nvidia-smi fails: No such file",
        "docker run --gpus all",
        {"read": files(__proc__driver__nvidia__version="Kernel Module for x86_64  535.129.03  X")},
    ),
    (
        "torch",
        "problem",
        "does not work: it crashed (SIGSEGV)",
        "pip install --force-reinstall --no-deps torch==",
        {"probe": probes(torch=Probe(fault="it crashed (SIGSEGV)"))},
    ),
    (
        "torch",
        "problem",
        "a wrong product",
        "pip install --force-reinstall torch",
        {"probe": probes(torch=Probe({"cpu": False, "cuda": None}))},
    ),
    ("torch", "warning", "is a CPU build, NVIDIA H100 stays idle", "download.pytorch.org/whl/cu130", {"run": gpu()}),
    ("torch", "warning", "is a CPU build", "download.pytorch.org/whl/cu126", {"run": gpu("535.129.03")}),
    (
        "torch",
        "problem",
        "built for CUDA 13.0, which needs driver 580.65; 535.129 is here",
        "download.pytorch.org/whl/cu126",
        {**ON_GPU, "run": gpu("535.129.03"), "probe": probes(torch=NO_GPU_TORCH, onnxruntime=CUDA_WORKS)},
    ),
    (
        "torch",
        "problem",
        "which needs driver 580.65; 470.82 is here",
        "install a driver of 525.60 or newer",
        {**ON_GPU, "run": gpu("470.82.01"), "probe": probes(torch=NO_GPU_TORCH, onnxruntime=CUDA_WORKS)},
    ),
    (
        "torch",
        "problem",
        "fails on NVIDIA H100: no kernel image",
        "pip install --force-reinstall torch",
        {**ON_GPU, "probe": probes(torch=NO_GPU_TORCH, onnxruntime=CUDA_WORKS)},
    ),
    (
        "onnxruntime",
        "problem",
        "does not work: ImportError: x",
        "pip install --force-reinstall --no-deps onnxruntime-gpu",
        {"probe": probes(onnxruntime=Probe(fault="ImportError: x"))},
    ),
    (
        "onnxruntime",
        "problem",
        "the CPU provider fails",
        "--force-reinstall",
        {"probe": probes(onnxruntime=Probe({"providers": {"CPUExecutionProvider": "bad"}}))},
    ),
    (
        "onnxruntime",
        "problem",
        "lists CUDA and cannot load it: libcudnn.so.9 is missing",
        "pip install 'onnxruntime-gpu[cuda,cudnn]'",
        {**ON_GPU, "probe": probes(torch=CUDA_TORCH, onnxruntime=CUDA_FAILS)},
    ),
    (
        "onnxruntime",
        "warning",
        "onnxruntime 1.31.1 is a CPU build, NVIDIA H100 stays idle",
        "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'",
        {
            "run": gpu(),
            "distributions": with_dists(
                Dist("onnxruntime", "1.31.1"), Dist("torch", "2"), without=("onnxruntime-gpu",)
            ),
            "probe": probes(torch=CUDA_TORCH),
        },
    ),
    (
        "memory",
        "warning",
        "1.0 GiB (a container's limit; the machine has 16 GiB), too little",
        "docker run -m 4g",
        {"read": files(**{"/sys/fs/cgroup/user/memory.max": f"{1 << 30}\n"})},
    ),
    (
        "cpus",
        "warning",
        "a container's limit of 1.5 cores, but 4 threads",
        "export OMP_NUM_THREADS=1",
        {"read": files(**{"/sys/fs/cgroup/user/me/cpu.max": "150000 100000"})},
    ),
    (
        "cpus",
        "warning",
        "a container's limit of 2 cores",
        "export OMP_NUM_THREADS=2",
        {
            "read": files(
                **{
                    "/proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n",
                    "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                    "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                }
            )
        },
    ),
    ("cpus", "warning", "OMP_NUM_THREADS is 64", "export OMP_NUM_THREADS=4", {"environ": {"OMP_NUM_THREADS": "64"}}),
    ("disk", "warning", "500 MiB free", "export LLMCTL_STORE=", {"free": 500 << 20}),
    ("disk", "problem", "1.0 MiB free", "export LLMCTL_STORE=", {"free": 1 << 20}),
    ("file-system", "problem", "renaming is not atomic", "export LLMCTL_STORE=", {"probe": place(rename=False)}),
    ("file-system", "warning", "locks do not work", "export LLMCTL_STORE=", {"probe": place(flock=False)}),
    ("file-system", "warning", "no hard links", "export LLMCTL_STORE=", {"probe": place(link=False)}),
    ("file-system", "warning", "cannot sync", "export LLMCTL_STORE=", {"probe": place(fsync=False)}),
    ("file-system", "warning", "takes A for a", "export LLMCTL_STORE=", {"probe": place(case=False)}),
    ("file-system", "warning", "network file system (nfs4)", "LLMCTL_STORE=", {"store": Path("/mnt/a b/store")}),
    (
        "file-system",
        "warning",
        "overlay, which is gone with the container",
        "export LLMCTL_STORE=",
        {"read": files(**{"/proc/self/mountinfo": "22 1 0:1 / / rw - overlay overlay rw"})},
    ),
    (
        "file-system",
        "problem",
        "/home/me/store cannot be written: PermissionError",
        "export LLMCTL_STORE=",
        {"probe": probes(place=Probe(fault="PermissionError: no"))},
    ),
    (
        "temporary",
        "warning",
        "mounted noexec",
        "export TMPDIR=",
        {"probe": probes(temporary=Probe({"directory": "/tmp", "exec": False}))},
    ),
    ("temporary", "problem", "no temporary files", "export TMPDIR=", {"probe": probes(temporary=Probe(fault="full"))}),
    ("open-files", "warning", "at most 256 at once", "ulimit -n 4096", {"open_files": 256}),
    ("encoding", "warning", "ANSI_X3.4-1968, not UTF-8", "export LC_ALL=C.UTF-8", {"encoding": "ANSI_X3.4-1968"}),
    ("clock", "problem", "before this version was made", "timedatectl set-ntp true", {"now": 0.0}),
    ("clock", "warning", "-60 s off", "timedatectl set-ntp true", {"probe": place(skew=-60.0)}),
    ("programs", "warning", "no git", "apt-get install git", {"which": lambda name: None if name == "git" else name}),
    (
        "programs",
        "warning",
        "no ssh-keygen",
        "apt-get install openssh-client",
        {"which": lambda name: None if name == "ssh-keygen" else name},
    ),
]


@pytest.mark.parametrize(
    ("check", "state", "said", "fix", "changes"), WORLDS, ids=[f"{row[0]}: {row[2][:40]}" for row in WORLDS]
)
def test_one_thing_is_wrong(check, state, said, fix, changes):
    found = [row for row in examine(checks(), healthy(**changes)) if row.check == check and row.state != "ok"]
    matching = [row for row in found if said in row.text]
    assert matching, [row.text for row in found]
    assert matching[0].state == state
    assert fix in matching[0].fix
    assert not [row for row in found if not row.fix], "whatever is wrong comes with a way out"


def test_every_check_has_a_world_in_which_it_finds_something():
    silent = {"versions", "spec"}  # information, and `test_a_spec_…`
    found = {row.check for row in examine(checks(), healthy(tried={"torch": "2.13.0"}, spec=lambda: spec({})))}
    assert found - {row[0] for row in WORLDS} == silent


def test_a_machine_with_a_gpu_on_which_all_is_well():
    world = healthy(**ON_GPU, probe=probes(torch=CUDA_TORCH, onnxruntime=CUDA_WORKS))
    found = examine(checks(), world)
    assert {row.state for row in found} == {"ok"}
    texts = {row.check: row.text for row in found}
    assert texts["gpu"] == "NVIDIA H100; driver 580.65"
    assert texts["torch"] == "2.13.0, built for CUDA 13.0, computes on H100"
    assert texts["onnxruntime"] == "onnxruntime-gpu 1.31.1, usable: CUDA, CPU"


def test_a_container_without_nvidia_smi(tmp_path):
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0/information").write_text("Model: \t\t NVIDIA L4\nIRQ:   \t\t 1\n")
    assert kernel_gpus(tmp_path) == ("NVIDIA L4",)
    read = files(__proc__driver__nvidia__version="NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build")
    world = healthy(read=read, kernel_gpus=("NVIDIA L4",))
    (found,) = compute.driver(world)
    assert (found.state, found.text) == ("ok", "NVIDIA L4; driver 580.65")


def test_a_version_that_nobody_can_read_is_no_conflict():
    assert list(packages.known_conflicts(healthy(distributions=with_dists(Dist("click", "unknown"))))) == []


def test_a_cuda_build_without_a_gpu_is_no_fault():
    world = healthy(
        distributions=with_dists(Dist("torch", "2.13.0")), probe=probes(torch=NO_GPU_TORCH, onnxruntime=CUDA_FAILS)
    )
    assert {row.state for row in examine((compute.driver, compute.torch, compute.onnxruntime), world)} == {"ok"}


def test_torchvision_beside_cuda_torch_is_no_fault():
    rows = with_dists(Dist("torch", "2.13.0"), Dist("torchvision", "0.28.0"), Dist("triton", "3.7.1"))
    assert list(packages.cpu_build(healthy(distributions=rows))) == []
    assert list(packages.cpu_build(healthy(distributions=with_dists(Dist("torchvision", "0.28.0+cpu"))))) == []


def test_versions_that_differ_are_information_only():
    world = healthy(tried={"torch": "2.13.0", "scipy": "1.18", "absent": "1"})
    (found,) = packages.tried(world)
    assert (found.state, found.text) == ("ok", "1 of 2 as tried; other: scipy 1.17 (tried 1.18)")


def test_constraints_are_read(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text(
        "torch==2.13.0   # why\nPyYAML==6.0.3\nonnxruntime<0 ; x\nonnxruntime==1 ; sys_platform != 'linux'\n"
    )
    assert tried_versions(path) == {"torch": "2.13.0", "pyyaml": "6.0.3"}
    assert tried_versions(tmp_path / "absent") == {}


def test_pip_is_called_by_its_path_where_another_comes_first():
    world = healthy(which=lambda name: f"/usr/bin/{name}", distributions=with_dists(without=("torch",)))
    (found,) = [row for row in packages.extras(world) if row.state != "ok"]
    assert found.fix == "/env/bin/python -m pip install 'llmctl[train]'"


def test_mounts_are_found_by_the_longest_point():
    assert machine.mount_type(MOUNTS, "/home/x") == "ext4"
    assert machine.mount_type(MOUNTS, "/mnt/a b/c") == "nfs4"
    assert machine.mount_type(MOUNTS, "/mnt/other") == "xfs"
    assert machine.mount_type(MOUNTS, "/mntx") == "ext4"
    assert machine.mount_type("damaged\n", "/") == ""


def test_the_least_limit_of_all_groups_counts():
    groups = {"/sys/fs/cgroup/user/me/memory.max": "max", "/sys/fs/cgroup/user/memory.max": str(8 << 30)}
    assert memory_limit(files(**groups)) == 8 << 30
    assert memory_limit(healthy().read) == 16 << 30
    old = {"/proc/self/cgroup": "4:memory:/x\n", "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(4 << 30)}
    assert memory_limit(files(**old)) == 4 << 30
    assert memory_limit(lambda path: "") is None


def test_a_check_that_fails_is_reported_and_the_others_go_on():
    def some_check(world):
        yield Finding("first", "ok", "fine")
        raise KeyError("oh")

    found = examine((some_check, packages.python), healthy())
    assert [(row.check, row.state) for row in found] == [("first", "ok"), ("some-check", "problem"), ("python", "ok")]
    assert found[1].text == "this check failed: KeyError: 'oh'"


# -- a spec -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """What `run` finds on the machine of `healthy`."""
    for name, value in (("cores", 4), ("devices", []), ("gpu_models", []), ("memory", 16 << 30)):
        monkeypatch.setattr(pipeline_machine, name, lambda value=value: value)
    monkeypatch.setattr(pipeline_machine, "free_bytes", lambda path: 100 << 30)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return monkeypatch


def spec(secrets, used=True, effect=False, **resources):
    stage = StageSpec(
        id="sft[lr=1]",
        base="sft",
        stage=SimpleNamespace(name="sft", extra="train", effect=effect),
        params=None,
        inputs={},
        outputs={},
        env={name: EnvValue(secret=name) for name in secrets if used},
        resources=Resources(**resources),
    )
    rows = {id: dataclasses.replace(stage, id=id) for id in ("sft[lr=1]", "sft[lr=2]")}
    return Pipeline(name="p", file=None, base=Path("/"), stages=rows, secrets=secrets)


def asked(pipeline, **changes):
    """The findings about a spec, and what `run` says of it before it begins; None where it would begin."""
    found = list(request.spec(healthy(spec=lambda: pipeline, **changes)))
    try:
        specs = select(pipeline).specs
        check_resources(specs, Path("/"))
        resolve(pipeline.secrets, names_of(specs))
    except MachineError as error:
        return found, error
    return found, None


TOKEN = {"token": Secret(name="token", origin="env", variable="HF_TOKEN")}
KEY = {"key": Secret(name="key", origin="file", path=Path("/no/such/key"))}
COMMAND = {"c": Secret(name="c", origin="command", command="exit 3")}


@pytest.mark.parametrize(
    ("pipeline", "said", "fix"),
    [
        (spec(TOKEN), "the variable HF_TOKEN is not set", "export HF_TOKEN=…"),
        (spec(KEY), "cannot read /no/such/key", "write its value there"),
        (spec({}, gpus=2), "asks for 2 GPUs, this machine has 0", "--set stages.sft.resources.gpus=…"),
        (spec({}, cpus=64), "asks for 64 CPU cores, this machine has 4", "resources.cpus=…"),
        (spec({}, memory=64 << 30), "asks for 64 GiB of memory, this machine has 16 GiB", "resources.memory=…"),
        (spec({}, disk=900 << 40), "of free disk, this machine has 100 GiB", "resources.disk=…"),
        (spec({}, gpu_type="H100"), "asks for a GPU of type H100, this machine has none", "resources.gpu_type=…"),
    ],
)
def test_a_spec_that_asks_for_what_is_not_here_is_told_what_run_says(here, pipeline, said, fix):
    (found,), refused = asked(pipeline)
    assert (found.state, found.text, found.fix) == ("problem", refused.message, refused.hint)
    assert said in found.text and fix in found.fix


def test_a_spec_whose_stages_lack_an_extra():
    (found,), _ = asked(spec({}), distributions=with_dists(without=("torch",)))
    assert (found.state, found.text) == ("problem", "sft cannot run without torch")
    assert "'llmctl[train]'" in found.fix


def test_a_spec_whose_needs_are_met_begins(here, tmp_path):
    here.setenv("HF_TOKEN", "x")
    (tmp_path / "key").write_text("x")
    here.setattr(pipeline_machine, "devices", lambda: ["0"])
    here.setattr(pipeline_machine, "gpu_models", lambda: ["NVIDIA H100 80GB HBM3"])
    for pipeline in (
        spec(TOKEN),
        spec({"key": dataclasses.replace(KEY["key"], path=tmp_path / "key")}),
        spec(KEY, used=False),
        spec({}, gpus=1, cpus=4, memory=1 << 30, disk=1 << 30, gpu_type="h100"),
    ):
        (found,), refused = asked(pipeline)
        assert (found.state, found.text, refused) == ("ok", "p: everything that it asks for is here", None)


def test_the_command_of_a_secret_is_not_run(here):
    (found,), refused = asked(spec(COMMAND))
    assert found.state == "ok" and "its command ended with exit 3" in refused.message


def test_what_only_an_effect_lacks_is_a_warning(here):
    effects = spec(TOKEN, effect=True, gpus=2)
    stages = {**effects.stages, **spec({}, used=False).stages}
    (first, second) = stages
    mixed = dataclasses.replace(effects, stages={first: effects.stages[first], second: stages[second]})
    found, refused = asked(mixed, distributions=with_dists(without=("onnxruntime-gpu",)))
    assert [row.state for row in found] == ["warning"] * 2 and refused is None


def test_what_a_spec_of_effects_alone_lacks_is_a_warning(here):
    found = list(request.spec(healthy(spec=lambda: spec(TOKEN, effect=True, gpus=2))))
    assert [row.state for row in found] == ["warning"] * 2


def test_the_value_of_a_secret_is_never_shown(here):
    here.setenv("HF_TOKEN", "canary-1234")
    world = healthy(spec=lambda: spec(TOKEN, gpus=9))
    assert "canary" not in as_text(examine(checks(), world)) + as_json(examine(checks(), world))


def test_a_spec_that_cannot_be_read():
    def fail():
        raise InputError("no such spec", hint="look")

    (found,) = request.spec(healthy(spec=fail))
    assert (found.state, found.text, found.fix) == ("problem", "no such spec", "look")


@pytest.fixture
def typed(here, tmp_path):
    """The stores and findings about the spec `s.yaml` of a command line, on a machine made up but for both."""
    (tmp_path / "s.yaml").write_text(
        "llmctl: 1\nname: s\nstore: ./kept\nstages:\n"
        "  data: {uses: data, with: {reader: python-stdlib}, resources: {gpus: 1}}\n"
        "profiles: {small: {stages: {data: {resources: {gpus: 0}}}}}\n"
    )
    here.chdir(tmp_path)
    here.delenv("LLMCTL_STORE", raising=False)
    stores = []

    def world(store, spec):
        stores.append(store)
        return healthy(spec=spec, store=store)

    here.setattr("llmctl.doctor.world.real_world", world)

    def run(*words):
        code = doctor.main(words, standalone_mode=False)
        return code, stores[-1]

    return run


def test_a_spec_is_changed_as_run_changes_it(typed, capsys):
    assert typed("s.yaml")[0] == 7 and "asks for 1 GPUs" in capsys.readouterr().out
    assert typed("s.yaml", "--profile", "small")[0] == 0
    assert typed("s.yaml", "--set", "stages.data.resources.gpus=0")[0] == 0
    assert typed("s.yaml", "--set-json", 'stages.data.resources={"gpus": 0}')[0] == 0
    with pytest.raises(UsageError, match="there is none"):
        typed("--set", "data.seed=1")
    with pytest.raises(UsageError, match="there is none"):
        typed("--profile", "small")


def test_the_store_is_the_one_that_run_takes(typed, tmp_path, monkeypatch, capsys):
    assert typed("s.yaml")[1] == tmp_path / "kept"
    assert typed("s.yaml", "--store", "given")[1] == tmp_path / "given"
    assert typed("absent.yaml")[1] == typed()[1] == tmp_path / ".llmctl/store"
    assert "cannot read absent.yaml" in capsys.readouterr().out
    monkeypatch.setenv("LLMCTL_STORE", str(tmp_path / "set"))
    assert typed("s.yaml")[1] == tmp_path / "set"


def test_the_report_counts():
    rows = [Finding("a", "problem", "x", "do"), Finding("b", "warning", "y", "do"), Finding("c", "warning", "z", "do")]
    assert as_text(rows).splitlines()[-1] == "1 problem, 2 warnings"
    assert MachineError.exit_code == 7
    assert dataclasses.asdict(rows[0])["fix"] in as_json(rows)


def test_a_terminal_sees_that_something_happens(monkeypatch):
    from rich.status import Status

    from llmctl.doctor import commands

    monkeypatch.setattr("llmctl.console.wants_bars", lambda stream: True)
    assert isinstance(commands._waiting(), Status)
    monkeypatch.setattr("llmctl.console.wants_bars", lambda stream: False)
    assert not isinstance(commands._waiting(), Status)
