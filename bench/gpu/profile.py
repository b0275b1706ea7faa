"""``python -m bench.gpu.profile``: where the time of a step goes, by torch.profiler; ``--loop``: only the step, for ncu."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.cases import Case, make_batches
from bench.gpu.clocks import Clocks
from bench.kernels.measure import make_call
from bench.kernels.peers import PEERS

CASES = (Case(256, 14), Case(65536, 14), Case(65536, 100), Case(65536, 1000))
REHEARSAL_CASES = (Case(64, 3),)
STEPS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.profile", description=__doc__)
    parser.add_argument("--cases", type=Case.parse, nargs="*", help="ROWSxCLASSES[:fp32|bf16|fp16|fp64]")
    parser.add_argument("--loop", type=int, metavar="STEPS", help="only run this number of forwards and backwards of each")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device that this torch can use; --rehearse runs the same code on the CPU")
    if options.rehearse:
        torch.set_num_threads(1)
    clocks = Clocks(torch.device("cpu" if options.rehearse else "cuda"))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if clocks.cuda else [])
    for case in options.cases or (REHEARSAL_CASES if options.rehearse else CASES):
        batches = make_batches(case, clocks.device, clocks.l2_bytes)
        call = make_call(PEERS["ours"].loss, batches, "forward_backward")
        call()
        clocks.synchronize()
        if options.loop is not None:
            for _ in range(options.loop):
                call()
            clocks.synchronize()
            continue
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(STEPS):
                call()
            clocks.synchronize()
        key = "self_cuda_time_total" if clocks.cuda else "self_cpu_time_total"
        print(f"== {case}, {STEPS} forwards and backwards")
        print(profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=70))
    return 0


if __name__ == "__main__":
    sys.exit(main())
