"""A small rank program for the launcher's tests: it joins gloo, sums over ranks, and reports.

Run as `rank_program RUN.yaml name=value…`. Every rank prints one JSON line with what it was given.
`then=wait` waits for ever after the sum, with two child processes, one of which has left the
rank's process group; `then=exit` ends rank 1 with code 7.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path


def main() -> None:
    """Sum (rank + 1) over all ranks and say what this rank sees."""
    import torch
    import torch.distributed as dist

    run_path, *overrides = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    total = torch.tensor([float(os.environ["RANK"]) + 1.0])
    dist.all_reduce(total)
    seen = {
        "rank": int(os.environ["RANK"]),
        "pid": os.getpid(),
        "sum": total.item(),
        "world": dist.get_world_size(),
        "overrides": overrides,
        "run_text": Path(run_path).read_text(encoding="utf-8"),
        "workdir": os.getcwd(),
        "interface": os.environ["GLOO_SOCKET_IFNAME"],
        "environment": {k: v for k, v in os.environ.items() if k.startswith("TEST_")},
    }
    print("SEEN " + json.dumps(seen), flush=True)
    if "then=wait" in overrides:
        subprocess.Popen(["sleep", "600"])
        subprocess.Popen(["sleep", "601"], start_new_session=True)
        print("WAITING", flush=True)
        time.sleep(600)
    dist.destroy_process_group()
    if "then=exit" in overrides and seen["rank"] == 1:
        sys.exit(7)


if __name__ == "__main__":
    main()
