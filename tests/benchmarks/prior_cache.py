"""How much faster a prior writes with its cache: python tests/benchmarks/prior_cache.py [batch
size]

Prints the seconds for whole maps of 16 x 16 codes with and without keys and values remembered,
in turn, and the ratio of the medians. The network is that of the laptop preset with fresh
weights: no time depends on what it learned."""

import statistics
import sys
import time

import torch

from brainldm.engineering.configs import PRIOR_PRESETS
from brainldm.engineering.covariates import Covariate
from brainldm.advanced.prior import CodeTransformer, sample_uniform

REPEATS = 5


def measure(batch_size):
    config = PRIOR_PRESETS['laptop']
    covariates = (Covariate('slice', 'continuous', range=(0, 31)),)
    net = CodeTransformer(
        1024, 16, covariates, config.embed_dim, config.num_layers, config.num_heads, code_dim=8
    ).eval()
    u, cond = sample_uniform(batch_size, 256, 0), dict(slice=torch.linspace(0, 1, batch_size))
    seconds = {True: [], False: []}
    with torch.no_grad():
        net.generate(u[:1], {'slice': cond['slice'][:1]})  # warm up
        for _ in range(REPEATS):
            for cached in (True, False):
                start = time.perf_counter()
                net.generate(u, cond, cached=cached)
                seconds[cached].append(time.perf_counter() - start)
    return seconds


if __name__ == '__main__':
    batch_size = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    seconds = measure(batch_size)
    for cached, name in ((True, 'with cache'), (False, 'without')):
        print(
            f'{name:11} {statistics.median(seconds[cached]):7.2f} s   of',
            ' '.join(f'{o:.2f}' for o in seconds[cached]),
        )
    ratio = statistics.median(seconds[False]) / statistics.median(seconds[True])
    print(
        f'{batch_size} maps of 256 codes, {torch.get_num_threads()} threads, {torch.__version__}:'
        f' {ratio:.1f} times faster with the cache'
    )
