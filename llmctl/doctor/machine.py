"""Checks of the machine: memory, cores and their limits, open files, text, clock, programs, where the store lies."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from llmctl.console import human_bytes
from llmctl.doctor.finding import Finding
from llmctl.doctor.world import World
from llmctl.pipeline.machine import group_values, memory_limit

LITTLE_MEMORY = 2 << 30
"""Importing torch and transformers takes about 1 GiB."""
LITTLE_SPACE = 1 << 30
EARLIEST = 1_767_225_600.0
"""2026-01-01: no installation of this version is older."""
NETWORK = re.compile(r"(nfs\d?|cifs|smb\w*|9p|ceph|lustre|beegfs|glusterfs|afs|fuse\.(sshfs|s3fs|rclone|gcsfuse).*)\Z")
FLEETING = {"overlay": "is gone with the container", "tmpfs": "is gone after a restart, and is memory"}
ELSEWHERE = "export LLMCTL_STORE=/path/on/a/local/disk"


def memory(world: World) -> Iterator[Finding]:
    """What may be used: the machine's, or less by a container's limit."""
    total = memory_limit(world.read)
    physical = _physical(world)
    if total is None or physical is None:
        return
    text = human_bytes(total) + (
        f" (a container's limit; the machine has {human_bytes(physical)})" if total < physical else ""
    )
    if total < LITTLE_MEMORY:
        yield Finding(
            "memory", "warning", f"{text}, too little to train or export", "give it 4 GiB: docker run -m 4g …"
        )
    else:
        yield Finding("memory", "ok", text)


def _physical(world: World) -> int | None:
    found = re.search(r"MemTotal:\s+(\d+) kB", world.read("/proc/meminfo"))
    return int(found[1]) * 1024 if found else None


def cpus(world: World) -> Iterator[Finding]:
    """Cores that may be used; threads are as many unless told otherwise."""
    quota = _quota(world)
    usable = min(world.affinity, quota or world.affinity)
    threads = world.environ.get("OMP_NUM_THREADS", "")
    text = f"{usable:g} of {world.cores} cores"
    if threads.isdecimal() and int(threads) > usable:
        said = f"{text}, OMP_NUM_THREADS is {threads}: threads wait for each other"
        yield Finding("cpus", "warning", said, f"export OMP_NUM_THREADS={max(1, int(usable))}")
    elif quota and quota < world.affinity and not threads:
        said = f"a container's limit of {quota:g} cores, but {world.affinity} threads: they wait for each other"
        yield Finding("cpus", "warning", said, f"export OMP_NUM_THREADS={max(1, int(quota))}")
    else:
        yield Finding("cpus", "ok", text)


def _quota(world: World) -> float | None:
    """Cores that a container may use, None without a limit."""
    found = []
    for text in group_values(world.read, "cpu", "cpu.max", ""):
        part, _, period = text.partition(" ")
        if part.isdecimal() and period.isdecimal():
            found.append(int(part) / int(period))
    periods = list(group_values(world.read, "cpu", "", "cpu.cfs_period_us"))
    for text, period in zip(group_values(world.read, "cpu", "", "cpu.cfs_quota_us"), periods, strict=False):
        if text.isdecimal() and period.isdecimal():
            found.append(int(text) / int(period))
    return min(found, default=None)


def open_files(world: World) -> Iterator[Finding]:
    """Sharded data sets and servers keep many files open."""
    if 0 <= world.open_files < 1024:
        yield Finding("open-files", "warning", f"at most {world.open_files} at once", "ulimit -n 4096")
    else:
        yield Finding(
            "open-files", "ok", f"at most {world.open_files} at once" if world.open_files >= 0 else "no limit"
        )


def text_encoding(world: World) -> Iterator[Finding]:
    """File names and texts are UTF-8."""
    if world.encoding.lower().replace("-", "") != "utf8":
        yield Finding(
            "encoding", "warning", f"{world.encoding}, not UTF-8: names and texts break", "export LC_ALL=C.UTF-8"
        )
    else:
        yield Finding("encoding", "ok", world.encoding)


def clock(world: World) -> Iterator[Finding]:
    """A clock that is far off breaks certificates; one that differs from the disk's, the cache of digests."""
    if world.now < EARLIEST:
        yield Finding(
            "clock", "problem", "it is set to a time before this version was made", "sudo timedatectl set-ntp true"
        )
        return
    skew = world.probe("place").values.get("skew", 0.0)
    if abs(skew) > 5:
        text = f"the file system of the store is {skew:+.0f} s off: its server has another time"
        yield Finding("clock", "warning", text, "sudo timedatectl set-ntp true")
    else:
        yield Finding("clock", "ok", "plausible")


def programs(world: World) -> Iterator[Finding]:
    """Programs that llmctl calls if they are there."""
    for name, package, use in (
        ("git", "git", "runs do not record the commit of the code"),
        ("ssh-keygen", "openssh-client", "artifacts cannot be signed, nor signatures checked"),
    ):
        if world.which(name) is None:
            yield Finding("programs", "warning", f"no {name}: {use}", f"sudo apt-get install {package}")
    found = [name for name in ("git", "ssh-keygen") if world.which(name)]
    if found:
        yield Finding("programs", "ok", ", ".join(found))


def disk(world: World) -> Iterator[Finding]:
    """Space where the store is."""
    text = f"{human_bytes(world.free)} free for {world.store}"
    if world.free < LITTLE_SPACE:
        yield Finding("disk", "problem" if world.free < 32 << 20 else "warning", text, ELSEWHERE)
    else:
        yield Finding("disk", "ok", text)


def file_system(world: World) -> Iterator[Finding]:
    """What the store's file system can do, by trying it."""
    kind = mount_type(world.read("/proc/self/mountinfo"), os.path.realpath(world.store))
    probe = world.probe("place")
    if probe.fault:
        yield Finding("file-system", "problem", f"{world.store} cannot be written: {probe.fault}", ELSEWHERE)
        return
    faults = list(_file_system_faults(world, kind))
    yield from faults
    if not faults:
        yield Finding("file-system", "ok", f"{kind or 'unknown'}: rename, link, lock and sync work")


def _file_system_faults(world: World, kind: str) -> Iterator[Finding]:
    can = world.probe("place").values
    name = "file-system"
    if not can["rename"]:
        yield Finding(name, "problem", f"renaming is not atomic on {kind}: results may be half written", ELSEWHERE)
    if not can["flock"]:
        yield Finding(name, "warning", f"locks do not work on {kind}: two runs may do the same work twice", ELSEWHERE)
    if not can["link"]:
        yield Finding(
            name, "warning", f"no hard links on {kind}: of two runs that finish together the last wins", ELSEWHERE
        )
    if not can["fsync"]:
        yield Finding(name, "warning", f"{kind} cannot sync: a power cut may lose finished results", ELSEWHERE)
    if not can["case"]:
        yield Finding(name, "warning", f"{kind} takes A for a: stages and files that differ in case collide", ELSEWHERE)
    if NETWORK.match(kind):
        yield Finding(
            name, "warning", f"the store is on a network file system ({kind}): slow, and locks may fail", ELSEWHERE
        )
    if kind in FLEETING:
        yield Finding(name, "warning", f"the store is on {kind}, which {FLEETING[kind]}", ELSEWHERE)


def mount_type(mountinfo: str, path: str) -> str:
    """The type of the file system that `path` lies on, by the longest mount point above it."""
    best, kind = "", ""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def temporary(world: World) -> Iterator[Finding]:
    """Compilers of torch and plugins start what they have written to the temporary directory."""
    probe = world.probe("temporary")
    if probe.fault:
        yield Finding(
            "temporary", "problem", f"no temporary files: {probe.fault}", "export TMPDIR=/path/that/is/writable"
        )
    elif not probe.values["exec"]:
        text = f"{probe.values['directory']} is mounted noexec: compiled models cannot be loaded"
        yield Finding("temporary", "warning", text, "export TMPDIR=$HOME/.cache/tmp && mkdir -p $TMPDIR")
    else:
        yield Finding("temporary", "ok", str(probe.values["directory"]))
