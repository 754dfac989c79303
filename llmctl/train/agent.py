"""torchrun's elastic agent for the ranks of one stage on this machine: starts them, and all anew if one is lost.

`python -m llmctl.train.agent FILE`, a JSON file with the fields of `Plan`. The command line of torchrun does the same;
this says in a file which rank ended first and how, where torchrun only prints it.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from llmctl.launch.worker import AGENT

DEATH = "death.json"


@dataclass(frozen=True)
class Plan:
    """What to start here, and where to meet the agents of the other machines."""

    words: list[str]
    """Arguments of the interpreter: the same for every rank."""
    nodes: int
    processes: int
    """On each machine."""
    restarts: int
    reports: str
    """Directory, the same on every machine."""
    meet: str
    """`host:port`; empty with one machine."""
    id: str

    def config(self) -> LaunchConfig:
        """The agent's own form of it."""
        alone = self.nodes == 1
        further: dict[str, Any] = {"local_addr": "127.0.0.1"} if alone else {}
        # Names of hosts do not always match what a machine calls itself, so Slurm's number says who is the host.
        number = os.environ.get("SLURM_NODEID")
        host = {} if alone or number is None else {"is_host": "1" if number == "0" else "0"}
        return LaunchConfig(
            min_nodes=self.nodes,
            max_nodes=self.nodes,
            nproc_per_node=self.processes,
            run_id=self.id,
            rdzv_backend="c10d",
            rdzv_endpoint=self.meet or "localhost:0",
            rdzv_configs=host,
            max_restarts=self.restarts,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=str(Path(self.reports) / f"torch-{os.getpid()}")),
            shutdown_timeout=5,  # a rank that waits for one that is gone does not leave by itself
            **further,
        )


def main() -> int:
    """Run the ranks; 1 if one of them failed for good."""
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    # The store of the agents lasts over restarts and remembers the addresses of the ranks that are gone: the new ones
    # would call those. Without it rank 0 serves a store of its own, every time at another port.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ[AGENT] = str(os.getpid())
    try:
        elastic_launch(plan.config(), sys.executable)(*plan.words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        values = {"rank": rank, "code": failure.exitcode, "time": failure.timestamp}
        (Path(plan.reports) / DEATH).write_text(json.dumps(values), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
