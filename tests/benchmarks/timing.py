"""What every benchmark here shares: contestants timed in turn, ratios with quartiles, a table, a
JSON file and a plot."""

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn

from brainldm.engineering.devices import pick_device, pick_precision
from brainldm.engineering.plotting import save_figure

DTYPES = dict(no=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


@dataclass
class Job:
    "What every benchmark is told."

    repeats: int = 7  # Rounds; in each of them every contestant runs once
    # wall: what a user waits for. cpu: own seconds only, for one thread on a busy machine
    clock: Literal['wall', 'cpu'] = 'wall'
    # auto: what training would choose on this device
    precision: Literal['auto', 'no', 'bf16', 'fp16'] = 'auto'
    out: Path = Path('runs/benchmarks')  # Where the JSON file and the plot go


def device_and_precision(job):
    "Where to compute (CUDA_VISIBLE_DEVICES= keeps it on the CPU), and in what."
    device = pick_device()
    if job.repeats < 1:
        raise ValueError(f'benchmark: repeats={job.repeats}. Expected 1 or more. Try 7.')
    if job.clock == 'cpu' and (device.type != 'cpu' or torch.get_num_threads() > 1):
        raise ValueError(
            f"benchmark: clock='cpu' with {torch.get_num_threads()} threads on {device}. Expected"
            " one thread on a CPU: elsewhere own seconds are not what a user waits for. Try"
            " OMP_NUM_THREADS=1, or clock='wall'."
        )
    return device, pick_precision(job.precision, device)


def autocast(device, precision):
    "The context in which training and sampling compute."
    return torch.autocast(device.type, DTYPES[precision]) if precision != 'no' else nullcontext()


def seconds(call, clock, device):
    "How long one call takes, the device's queue emptied before and after."
    now, wait = (
        dict(wall=time.perf_counter, cpu=time.process_time)[clock],
        getattr(torch, device.type).synchronize,
    )
    wait()
    start = now()
    call()
    wait()
    return now() - start


def interleave(
    contestants: dict[str, Callable],  # What to time, by name
    job: Job,  # Rounds and clock
    device: torch.device,  # Where they compute
) -> pd.DataFrame:  # Seconds: a row a round, a column a contestant
    """A B C A B C ...: whatever disturbs the machine disturbs all of them.

    One round before is not counted."""
    for call in contestants.values():
        call()
    return pd.DataFrame(
        [
            {k: seconds(call, job.clock, device) for k, call in contestants.items()}
            for _ in range(job.repeats)
        ]
    )


def quartiles(values):
    "First quartile, median, third quartile."
    values = list(values)
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method='inclusive')


def ratio(over, under, target=''):
    "Median and quartiles of the ratios of the rounds, as columns of a table."
    low, mid, high = quartiles(over / under)
    return dict(ratio=mid, q1=low, q3=high, target=target)


def count(net: nn.Module):
    "Number of parameters."
    return sum(p.numel() for p in net.parameters())


def machine(job, device, precision):
    "What a reader must know in order to evaluate the numbers."
    return dict(
        date=datetime.date.today().isoformat(),
        machine=f'{cpu_name()}, {platform.system()} {platform.machine()}',
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        precision=precision,
        clock=job.clock,
        repeats=job.repeats,
    )


def cpu_name():
    "The processor and its features for low precision, as far as the system tells."
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or 'unknown processor'
    facts = {k.strip(): v.strip() for k, _, v in (o.partition(':') for o in lines)}
    flags = [
        o
        for o in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16')
        if o in facts.get('flags', '').split()
    ]
    return ' '.join([facts.get('model name', 'unknown processor'), *flags[-2:]])


def publish(
    name: str,  # Of the benchmark, and of its files
    table: pd.DataFrame,  # One row a comparison
    job: Job,  # Where to write
    where: dict,  # As from `machine`
    draw: Callable,  # Called as sample(table), gives the figure
    **more,  # Anything else for the JSON file
) -> pd.DataFrame:  # The table
    "Print the table and write OUT/NAME.json and OUT/NAME.png."
    matplotlib.use('Agg')
    print(table.to_string(float_format=lambda v: f'{v:.4g}', na_rep=''))
    print(where)
    job.out.mkdir(parents=True, exist_ok=True)
    (job.out / f'{name}.json').write_text(
        json.dumps(
            dict(where=where, rows=json.loads(table.to_json(orient='records')), **more), indent=1
        )
    )
    save_figure(draw(table), job.out / f'{name}.png')
    return table


def draw_ratios(title, label):
    """A function that samples the column `ratio` with its quartiles, a bar a row, and the targets
    as ticks."""

    def draw(table):
        rows = table.dropna(subset=['ratio'])
        fig, ax = plt.subplots(figsize=(7.5, 1 + 0.28 * len(rows)), layout='constrained')
        y = range(len(rows))
        ax.barh(
            y, rows.ratio, xerr=[rows.ratio - rows.q1, rows.q3 - rows.ratio], color='C0', alpha=0.7
        )
        for i, target in enumerate(rows.target):
            if target:
                ax.plot([float(target.split()[-1])] * 2, [i - 0.4, i + 0.4], color='C3', lw=2)
        ax.set_yticks(y, rows.what, fontsize=7)
        ax.invert_yaxis()
        ax.axvline(1, color='k', lw=0.7, ls=':')
        ax.set(xlabel=label, title=title)
        return fig

    return draw
