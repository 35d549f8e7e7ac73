"""Two processes against one: the same images in the same order, the same weights, one writer.

The single process adds up the gradients of two batches where the two processes have one each;
chance depends on the place in the line of images, so both sample the same noise. The codebook
counts words batch by batch, so there the single process takes a batch of twice the size; it
samples no noise."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from brainldm.engineering.configs import AEConfig, DataConfig, LDMConfig, PhantomConfig, PriorConfig
from brainldm.engineering.phantom import make_cohort
from brainldm.data import open_dataset
from brainldm.training import train_autoencoder, train_ldm
from brainldm.advanced.prior import train_prior

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='gloo on POSIX')
# What `accelerate launch` starts on GPUs; with --cpu it starts one process only, whatever it is
# told.
TWO = ['-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '29533']
ENV = dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', PYTHONWARNINGS='ignore')
OFTEN = dict(
    total_images=48,
    warmup_images=8,
    validate_every=10**6,
    checkpoint_every=24,
    log_every=1,
    precision='no',
)
AE = AEConfig(
    data=DataConfig(size=32),
    channels=(16,),
    attention_levels=(False,),
    num_res_blocks=1,
    patch=4,
    latent_channels=4,
    **OFTEN,
)
VQ = replace(AE, kind='vq', num_embeddings=16)
LDM = LDMConfig(
    channels=(16,),
    attention_levels=(True,),
    num_res_blocks=1,
    num_heads=2,
    dropout=0.1,
    cond_channels=16,
    ema_images=16,
    preview_steps=2,
    **OFTEN,
)
PRIOR = PriorConfig(embed_dim=16, num_layers=1, num_heads=2, ema_images=16, **OFTEN)


def train_all(data, out, batch, accumulate):
    "Every training, with so many images a process and a step."
    torch.set_num_threads(1)
    data = open_dataset(data, AE.data, progress=False)
    options, whole = dict(batch_size=batch, accumulate=accumulate, log_every=accumulate), dict(
        batch_size=batch * accumulate
    )
    train_autoencoder(data, out / 'kl', replace(AE, **options), progress=False)
    train_ldm(data, out / 'kl', replace(LDM, **options), progress=False)
    train_autoencoder(data, out / 'vq', replace(VQ, **whole), progress=False)
    train_prior(data, out / 'vq', replace(PRIOR, **options), progress=False)


@pytest.fixture(scope='module')
def one_and_two(tmp_path_factory):
    "Folders with the runs of one process, and of two."
    place = tmp_path_factory.mktemp('processes')
    data = make_cohort(
        place / 'data', PhantomConfig(num_subjects=8, num_slices=4, size=32), progress=False
    )
    train_all(data, place / 'one', 2, 2)
    script = place / 'two.py'
    script.write_text(
        f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import'
        f' Path\nfrom test_processes import train_all\ntrain_all(Path({str(data)!r}),'
        f' Path({str(place/"two")!r}), 2, 1)\n'
    )
    done = subprocess.run(
        [sys.executable, *TWO, str(script)], capture_output=True, text=True, timeout=400, env=ENV
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return place / 'one', place / 'two'


@pytest.mark.parametrize('name', ['kl/autoencoder', 'kl/ldm', 'vq/autoencoder', 'vq/prior'])
def test_two_processes_end_where_one_does(name, one_and_two):
    ours, theirs = (load_file(o / f'{name}.safetensors') for o in one_and_two)
    assert set(ours) == set(theirs)
    for k in ours:
        assert_close(theirs[k], ours[k], rtol=2e-3, atol=2e-4, msg=lambda m: f'{name} {k}: {m}')


@pytest.mark.parametrize(
    'name, stage', [('kl', 'autoencoder'), ('kl', 'ldm'), ('vq', 'autoencoder'), ('vq', 'prior')]
)
def test_one_process_writes_the_log(name, stage, one_and_two):
    def records(o):
        return [
            r
            for r in map(json.loads, (o / name / 'log.jsonl').read_text().splitlines())
            if r['stage'] == stage and 'loss' in r
        ]

    ours, theirs = (records(o) for o in one_and_two)
    seen = [r['images'] for r in theirs]
    assert seen == sorted(set(seen)) and seen[-1] == 48  # nobody else writes
    last = {r['images']: r['loss'] for r in ours}
    # the same images; a record of two processes is their mean
    for r in theirs:
        assert r['loss'] > 0 and abs(r['loss'] / last[r['images']] - 1) < 0.5


def test_nothing_is_left_over(one_and_two):
    ours, theirs = (
        sorted(str(p.relative_to(o)) for p in o.rglob('*') if p.is_file()) for o in one_and_two
    )
    assert ours == theirs and not [o for o in theirs if o.endswith('.part')]


def test_two_processes_draw_what_one_draws(one_and_two, tmp_path):
    run = one_and_two[0] / 'kl'
    line = ['sample', str(run), '--n', '5', '--steps', '3', '--slice', '2', '--out']
    for name, options in (('one', []), ('two', TWO)):
        script = tmp_path / f'{name}.py'  # torchrun would take --n for its own
        script.write_text(
            'import sys\nfrom brainldm.engineering.cli import'
            f' main\nprint("sampling")\nsys.exit(main({[*line, str(tmp_path/name)]!r}))\n'
        )
        done = subprocess.run(
            [sys.executable, *options, str(script)],
            capture_output=True,
            text=True,
            timeout=200,
            env=ENV,
        )
        assert done.stdout.count('sampling') == (2 if options else 1)
        assert done.returncode == 0 and done.stdout.count('5 synthetic images') == 1, (
            done.stdout + done.stderr
        )
    ours, theirs = (
        {o.name: o.read_bytes() for o in (tmp_path / name).glob('*.png')} for name in ('one', 'two')
    )
    assert len(ours) == 6 and ours == theirs  # five images and their grid


PLACES = """
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from brainldm.engineering.devices import pick_device
from brainldm.engineering.loop import process_state

zeros_of_torch = torch.zeros


def zeros(*args, device=None, **kwargs):
    if 'cuda' in str(device):
        return SimpleNamespace(device=torch.device(device))
    return zeros_of_torch(*args, device=device, **kwargs)


# a machine with two GPUs, as far as it is asked
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.zeros = zeros
taken = pick_device()
# as `accelerate launch --cpu` does
os.environ['ACCELERATE_USE_CPU'] = 'true'
before = pick_device()
state = process_state()
after = pick_device()
seen = f'takes {taken}, of {state.num_processes}: {before} {state.device.type} {after}'
Path(sys.argv[1], os.environ['LOCAL_RANK']).write_text(seen)
"""


def test_each_process_takes_its_own_device(tmp_path):
    """Two processes: each its own GPU before anything has set accelerate up, and what accelerate
    says afterwards. Each writes a file of its own: lines of two processes mix in one pipe."""
    script = tmp_path / 'places.py'
    script.write_text(PLACES)
    seen = tmp_path / 'seen'
    seen.mkdir()
    alone = {k: v for k, v in ENV.items() if k != 'ACCELERATE_USE_CPU'}
    done = subprocess.run(
        [sys.executable, *TWO, str(script), str(seen)],
        capture_output=True,
        text=True,
        timeout=200,
        env=alone,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {o.name: o.read_text() for o in seen.iterdir()} == {
        '0': 'takes cuda:0, of 2: cpu cpu cpu',
        '1': 'takes cuda:1, of 2: cpu cpu cpu',
    }
