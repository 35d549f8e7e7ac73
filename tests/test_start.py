"""Light paths stay light: what `brainldm --help`, the configurations and the sampler must not load.

Modules are named, seconds are not: `tests/benchmarks/start.py` measures those."""

import subprocess
import sys

import pytest

LIBRARIES = (
    'accelerate huggingface_hub.hf_api IPython ipywidgets matplotlib nibabel nilearn pandas scipy'
    ' sklearn torch._dynamo torchmetrics torchvision umap'
).split()  # what a function imports when it needs it
NO_TORCH = ['torch', 'numpy', 'PIL', *LIBRARIES]

PATHS = {
    'import brainldm': NO_TORCH,
    'import brainldm.engineering.configs': NO_TORCH,
    'import brainldm.engineering.cli': NO_TORCH,
    'import brainldm.engineering.files': ['torch', *LIBRARIES],
    'import brainldm.engineering.devices': LIBRARIES,
    'import brainldm.engineering.plotting': LIBRARIES,
    'import brainldm.engineering.layers': LIBRARIES,
    'import brainldm.scheduler': LIBRARIES,
    'import brainldm.vae': LIBRARIES,
    'import brainldm.vqgan': LIBRARIES,
    'import brainldm.unet': LIBRARIES,
    'import brainldm.sampling': LIBRARIES,
}
COMMANDS = (
    '',
    'demo',
    'phantom',
    'heads',
    'prepare',
    'check',
    'train',
    'train autoencoder',
    'train ldm',
    'train prior',
    'train volume',
    'reconstruct',
    'bits',
    'sample',
    'edit',
    'volume',
    'evaluate',
    'explore',
    'report',
    'fetch',
    'share',
)


def loaded(code, names):
    "Which of some modules a fresh process has loaded once it has run `code`; and what it printed."
    asks = f"{code}\nimport sys\nprint('LOADED', *[m for m in {list(names)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, '-c', asks], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, _, modules = done.stdout.rpartition('LOADED')
    return modules.split(), said


@pytest.mark.parametrize('path', PATHS)
def test_an_import_loads_no_more_than_it_needs(path):
    assert loaded(path, PATHS[path])[0] == []


def test_the_names_would_be_found():
    assert loaded('import torch, pandas', LIBRARIES + ['torch'])[0] == ['pandas', 'torch']


HELP = """
from brainldm.engineering.cli import main
try:
    main({words!r})
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize('command', COMMANDS)
def test_help_does_not_load_torch(command):
    modules, said = loaded(HELP.format(words=[*command.split(), '--help']), NO_TORCH)
    assert modules == [] and 'usage: brainldm' in said


def test_every_command_is_tested():
    from brainldm.engineering.cli import COMMANDS as known

    assert {c.split()[0] for c in COMMANDS if c} == set(known)


@pytest.mark.parametrize('shell', ['bash', 'zsh'])
def test_completions_are_printed_without_torch(shell):
    words = ['--tyro-print-completion', shell]
    modules, said = loaded(HELP.format(words=words), NO_TORCH)
    assert modules == [] and 'brainldm' in said and 'autoencoder' in said
