"Files and run folders for maintainers: whole or not there, readable, complete."

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from brainldm.engineering.configs import AEConfig, DataConfig, PhantomConfig
from brainldm.engineering.files import write_atomic
from brainldm.engineering.phantom import make_cohort
from brainldm.data import open_dataset
from brainldm.vae import AutoencoderKL
from brainldm.engineering.loop import Learner
from brainldm.engineering.runs import (
    Checkpoint,
    load_weights,
    open_run,
    pack_state,
    save_weights,
    unpack_state,
)
from brainldm.engineering.stage1 import evenly_spaced_rows, load_autoencoder, validate_autoencoder
from brainldm.training import train_autoencoder
from brainldm.engineering import runs
from brainldm import training
from test_loop import AveragedConfig, line, line_data, line_loss

CONFIG = AveragedConfig(batch_size=8, precision='no')


def test_state_goes_through_a_file_unchanged(tmp_path):
    x, y = line_data()
    learner = Learner(line(), line_loss, CONFIG)
    learner.step(dict(x=x[:8], y=y[:8]))
    tensors, info = pack_state(learner)
    save_weights(tmp_path / 's.safetensors', tensors, info)
    fresh = Learner(nn.Linear(3, 1), line_loss, CONFIG)
    unpack_state(fresh, *load_weights(tmp_path / 's.safetensors'))
    again, _ = pack_state(fresh)
    assert set(again) == set(tensors) and all(
        torch.equal(again[k], tensors[k]) and again[k].dtype == tensors[k].dtype for k in tensors
    )


@pytest.mark.skipif(os.name == 'nt', reason='limits of POSIX')
def test_no_space_left(tmp_path):
    """A real limit on the size of files: the write fails half way, the old file stays, nothing
    else does."""
    import resource

    write_atomic(tmp_path / 'f', b'old')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError):
            save_weights(tmp_path / 'f', dict(w=torch.zeros(100_000)), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / 'f').read_bytes() == b'old' and os.listdir(tmp_path) == ['f']


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_while_writing(tmp_path):
    """kill -9 between writing and renaming: the old state stays, and the next save clears away
    what was left."""
    states = Checkpoint(tmp_path)
    states.save(8, dict(w=torch.ones(5)), {})
    child = os.fork()
    if not child:
        runs.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        try:
            states.save(16, dict(w=torch.zeros(5)), {})
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(list(tmp_path.glob('.*.part'))) == 1
    assert states.load()[1]['seen'] == 8
    states.save(16, dict(w=torch.zeros(5)), {})
    assert sorted(os.listdir(tmp_path)) == ['000000000008.safetensors', '000000000016.safetensors']


@pytest.mark.skipif(os.name == 'nt', reason='modes of POSIX')
def test_files_can_be_read_by_whom_the_umask_says(tmp_path):
    write_atomic(tmp_path / 'atomic', b'x')
    (tmp_path / 'plain').write_bytes(b'x')
    assert (tmp_path / 'atomic').stat().st_mode == (tmp_path / 'plain').stat().st_mode


def test_a_run_from_before_a_setting_was_invented_is_resumed(tmp_path):
    make_cohort(
        tmp_path / "cohort", PhantomConfig(num_subjects=12, num_slices=2, size=32), progress=False
    )
    config, dataset = AEConfig(data=DataConfig(size=32)), open_dataset(
        tmp_path / "cohort", DataConfig(size=32), progress=False
    )
    open_run(tmp_path / "run", "autoencoder", config, dataset)
    note = json.loads((tmp_path / "run" / "config.json").read_text())
    del (
        note["autoencoder"]["config"]["data"]["columns"],
        note["autoencoder"]["config"]["auto_find_batch_size"],
    )
    (tmp_path / "run" / "config.json").write_text(json.dumps(note))
    assert open_run(tmp_path / "run", "autoencoder", config, dataset, resume=True) is None
    changed = AEConfig(data=DataConfig(size=32, columns=("apoe",)))
    with pytest.raises(ValueError, match="data.columns=.*apoe"):
        open_run(tmp_path / "run", "autoencoder", changed, dataset, resume=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_weights_leave_no_file_open(tmp_path):
    "Windows removes no mapped file, and an old state is removed while its tensors are in use."
    save_weights(tmp_path / "w.safetensors", dict(w=torch.ones(1000)), {})
    tensors, _ = load_weights(tmp_path / "w.safetensors")
    assert (
        str(tmp_path / "w.safetensors") not in Path("/proc/self/maps").read_text()
        and tensors["w"].sum() == 1000
    )


@pytest.mark.parametrize("auto", [False, True])
def test_a_full_memory_cuts_the_batch_of_a_real_training(tmp_path, auto):
    """Memory for four images a step: the training says what to try, or ends with the weights that
    batch 4 with two steps added up gives."""
    make_cohort(
        tmp_path / "cohort", PhantomConfig(num_subjects=12, num_slices=2, size=32), progress=False
    )
    dataset = open_dataset(tmp_path / "cohort", DataConfig(size=32), progress=False)
    config = AEConfig(
        data=DataConfig(size=32),
        total_images=64,
        batch_size=8,
        channels=(8,),
        attention_levels=(False,),
        patch=4,
        latent_channels=2,
        warmup_images=8,
        validate_every=64,
        checkpoint_every=16,
        log_every=2,
        precision="no",
    )
    plain, room = training.autoencoder_loss, 4

    def hungry(model, batch, *args, **kwargs):
        if len(batch["image"]) > room:
            torch.empty(1 << 50, dtype=torch.uint8)
        return plain(model, batch, *args, **kwargs)

    cut = replace(config, batch_size=4, accumulate=2, log_every=4)
    wanted = train_autoencoder(dataset, tmp_path / "cut", cut, progress=False).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "autoencoder_loss", hungry)
        if not auto:
            with pytest.raises(
                RuntimeError,
                match=(
                    r"train_autoencoder: out of memory at batch_size=8.*batch_size=4, accumulate=2"
                ),
            ):
                train_autoencoder(dataset, tmp_path / "run", config, progress=False)
            return
        with pytest.warns(UserWarning, match="Going on with batch_size=4, accumulate=2"):
            got = train_autoencoder(
                dataset,
                tmp_path / "run",
                replace(config, auto_find_batch_size=True),
                progress=False,
            ).state_dict()
    assert set(got) == set(wanted) and all(torch.equal(got[k], wanted[k]) for k in got)


@pytest.mark.parametrize("where", ["batch", "one"])
def test_a_full_memory_in_validation_leaves_the_training_batch(where, tmp_path):
    """Held-out slices are looked at a few at a time; where even one does not fit, training stops
    and says so. The batch of training is never cut for it."""
    make_cohort(
        tmp_path / "cohort", PhantomConfig(num_subjects=12, num_slices=12, size=32), progress=False
    )
    dataset = open_dataset(
        tmp_path / "cohort", DataConfig(size=32, validate_fraction=0.3), progress=False
    )
    config = AEConfig(
        data=DataConfig(size=32, validate_fraction=0.3),
        total_images=64,
        batch_size=8,
        channels=(8,),
        attention_levels=(False,),
        patch=4,
        latent_channels=2,
        warmup_images=8,
        validate_every=32,
        checkpoint_every=32,
        log_every=2,
        precision="no",
    )
    plain, room = AutoencoderKL.forward, 8 if where == "batch" else 0

    def crowded(self, x, *args):
        if not torch.is_grad_enabled() and len(x) > room:
            torch.empty(1 << 50, dtype=torch.uint8)
        return plain(self, x, *args)

    wanted = train_autoencoder(dataset, tmp_path / "wanted", config, progress=False).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoencoderKL, "forward", crowded)
        requested = replace(config, auto_find_batch_size=True)
        if where == "one":
            with pytest.warns(UserWarning), pytest.raises(
                RuntimeError, match="train_autoencoder: out of memory outside of a training step"
            ):
                train_autoencoder(dataset, tmp_path / "run", requested, progress=False)
        else:
            got = train_autoencoder(
                dataset, tmp_path / "run", requested, progress=False
            ).state_dict()
            assert all(torch.equal(got[k], wanted[k]) for k in wanted)
    found = json.loads((tmp_path / "run" / "config.json").read_text())["autoencoder"]["config"]
    assert (found["batch_size"], found["accumulate"]) == (8, 1)


def test_validation_in_chunks_gives_the_numbers_of_one_batch(tiny_run, tmp_path):
    run, data = tiny_run
    dataset = open_dataset(
        data, DataConfig(size=64, validate_fraction=0.2, test_fraction=0.2), progress=False
    )
    model, _ = load_autoencoder(run)
    batch = evenly_spaced_rows(dataset.subset("validate"), 128)
    whole, parts = (
        validate_autoencoder(model, batch, tmp_path / "a.png", chunk=k) for k in (128, 2)
    )
    assert set(whole) == set(parts) and all(
        whole[k] == pytest.approx(parts[k], rel=1e-4) for k in whole
    )
