"""Peak memory of one long forward + backward, in a process of its own so that nothing else has raised it: prints JSON.

python benchmarks/peak_memory.py --seqlen 32768 --heads 2 --head-dim 64
"""

from __future__ import annotations

import argparse
import json
import time

from case import FORWARD_BACKWARD, Case
from memory import peak_of
from peers.base import make_inputs
from peers.ours import Ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    args = parser.parse_args()

    case = Case(
        "memory", heads=args.heads, heads_k=args.heads, seqlen=args.seqlen, head_dim=args.head_dim, steps=FORWARD_BACKWARD
    )
    inputs = make_inputs(case)
    call = Ours(threads=0).prepare(case, inputs)
    start = time.perf_counter()
    peak = peak_of(call)
    seconds = time.perf_counter() - start
    q_bytes = inputs.q.nbytes
    print(
        json.dumps(
            {
                "label": f"{case.label} {case.steps}",
                "seconds": seconds,
                "gflops": case.flops() / seconds * 1e-9,
                "q_mib": q_bytes / 2**20,
                "mlx_copies": peak.mlx_bytes / q_bytes,
                "process_copies": None if peak.process_bytes is None else peak.process_bytes / q_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
