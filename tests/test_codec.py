"The codec: encode and decode, conditions, and folders of images that say what they are."

import json

import numpy as np
import pytest
import torch
from PIL import Image

import brainldm.engineering.codec as codec_module
from brainldm.engineering.configs import DataConfig
from brainldm.engineering.devices import pick_device, pick_precision
from brainldm.engineering.covariates import Covariate
from brainldm.data import check_dataset, open_dataset, read_manifest
from brainldm.vae import AutoencoderKL
from brainldm.engineering.stage1 import load_autoencoder
from brainldm.engineering.codec import (
    SYNTHETIC,
    Codec,
    check_conditions,
    check_images,
    in_batches,
    manifest_of,
    required_conditions,
    save_gif,
    save_images,
    to_bytes,
)


@pytest.fixture(scope='module')
def codec(tiny_run):
    return Codec(load_autoencoder(tiny_run[0])[0].to('cpu'), 64)


def test_reconstruct(codec, tiny_run):
    batch = open_dataset(tiny_run[1], DataConfig(size=64), progress=False).__getitems__(range(3))
    assert codec.reconstruct(batch['image'], batch).shape == (3, 1, 64, 64)
    assert codec.encode(batch['image']).shape == (3, 4, 8, 8)
    with pytest.raises(ValueError, match='multiples'):
        codec.reconstruct(torch.zeros(1, 1, 60, 60))


@pytest.mark.parametrize(
    'n, conditions',
    [
        (1, {}),
        (3, dict(diagnosis='AD', slice=2)),
        (2, dict(slice=[1.5, None], diagnosis=['AD', None])),
        (65, dict(slice=np.arange(65) % 6)),
        (2, dict(slice=torch.tensor([0.0, 3.0]))),
    ],
)
def test_saved_folder(tmp_path, n, conditions):
    images = torch.rand(n, 1, 16, 16) * 2 - 1
    folder = save_images(
        images, tmp_path / 'new' / 'drawn', conditions, dict(seed=1, sampler='ddim')
    )
    table = read_manifest(folder)
    assert len(table) == n and set(table.split) <= {'train', 'validate', 'test'}
    assert check_dataset(folder, DataConfig(size=16), progress=False).ok
    table = table.sort_values('path')
    for path, image in zip(table.path, images):
        with Image.open(folder / path) as im:
            note = json.loads(im.info['brainldm'])
            assert (
                note['synthetic'] is True
                and im.info['Description'] == SYNTHETIC
                and note['seed'] == 1
            )
            assert np.array_equal(np.asarray(im), to_bytes(image)[0])


def test_metadata_keeps_what_was_asked(tmp_path):
    folder = save_images(
        torch.zeros(2, 1, 8, 8) + torch.tensor([0.0, 0.5]).view(2, 1, 1, 1),
        tmp_path / 'a',
        dict(slice=[1.5, None]),
        {},
    )
    notes = [
        json.loads(Image.open(folder / f'image_{i:04d}.png').info['brainldm']) for i in range(2)
    ]
    assert notes[0]['slice'] == 1.5 and 'slice' not in notes[1]
    assert manifest_of(dict(slice=[1.5, None]), 2)['slice'].tolist() == [2, 0]


def test_nothing_is_overwritten(tiny_run, tmp_path):
    images = torch.zeros(1, 1, 8, 8)
    before = sorted(o.name for o in tiny_run[0].rglob('*'))
    for place in (tiny_run[0], tiny_run[0] / 'config.json'):
        with pytest.raises(FileExistsError, match='nothing is overwritten'):
            save_images(images, place, {}, {})
    assert sorted(o.name for o in tiny_run[0].rglob('*')) == before
    with pytest.raises(ValueError, match='3 values of age'):
        save_images(images, tmp_path / 'b', dict(age=[1, 2, 3]), {})
    with pytest.raises(ValueError, match='not finite'):
        save_images(images * float('nan'), tmp_path / 'b', {}, {})
    assert not (tmp_path / 'b').exists()


def test_a_folder_is_taken_once(tmp_path, monkeypatch):
    """Two processes found the same empty folder: whoever makes the first file has it, and the
    other is told."""
    (tmp_path / 'out').mkdir()
    # as if both had looked before either wrote
    monkeypatch.setattr(codec_module, 'refuse_taken', lambda o: o)
    first = save_images(torch.zeros(2, 1, 8, 8), tmp_path / 'out', {}, dict(seed=1))
    before = {o.name: o.read_bytes() for o in first.iterdir()}
    with pytest.raises(FileExistsError, match='taken by another process. Expected'):
        save_images(torch.ones(2, 1, 8, 8), tmp_path / 'out', {}, dict(seed=2))
    assert {o.name: o.read_bytes() for o in first.iterdir()} == before


@pytest.mark.parametrize('n', [1, 2, 4, 9])
@pytest.mark.parametrize('frames', [1, 5])
def test_gif(tmp_path, n, frames):
    path = save_gif([torch.rand(n, 1, 8, 10) * 2 - 1 for _ in range(frames)], tmp_path / 'a.gif')
    with Image.open(path) as im:
        assert (
            im.size == (10 * min(n, 4), 8)
            and im.n_frames == frames
            and b'Synthetic' in im.info['comment']
        )
    with pytest.raises(FileExistsError):
        save_gif([torch.zeros(1, 1, 8, 8)], path)


def test_gif_refuses(tmp_path):
    for frames, seconds in (([], 4.0), ([torch.zeros(1, 1, 8, 8)], 0.0)):
        with pytest.raises(ValueError, match='save_gif'):
            save_gif(frames, tmp_path / 'a.gif', seconds)


def test_conditions_of_a_run_of_one_slice():
    covariates = (Covariate('slice', 'continuous', range=(4.0, 4.0)),)
    assert check_conditions(dict(slice=4), covariates, 2)['slice'].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match='Expected 4 to 4'):
        check_conditions(dict(slice=5), covariates, 1)


@pytest.mark.parametrize('batch_size', [1, 3, 7, 50])
def test_random_pictures_are_named_by_seed_and_number(codec, batch_size):
    seven = codec.sample_stage1(7, seed=2)
    torch.testing.assert_close(
        codec.sample_stage1(7, seed=2, batch_size=batch_size), seven, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        codec.sample_stage1(3, seed=2, first=4), seven[4:], rtol=0, atol=1e-4
    )
    assert (codec.sample_stage1(7, seed=3) - seven).abs().max() > 1e-4


@pytest.mark.parametrize('n, batch_size', [(1, 1), (5, 2), (6, 3), (3, 50)])
def test_batches_cover_a_request_once(n, batch_size):
    parts = list(in_batches(dict(a=torch.arange(n)), n, batch_size, 'cpu'))
    assert torch.cat([o['a'] for _, _, o in parts]).tolist() == list(range(n)) and all(
        0 < j - i == len(o['a']) <= batch_size for i, j, o in parts
    )


def test_a_conditional_autoencoder_is_told_everything():
    own = Covariate('scanner', 'categorical', values=('1.5T', '3T'))
    torch.manual_seed(0)
    auto = AutoencoderKL(4, (16,), 1, (False,), 8, covariates=(own,))
    for p in auto.parameters():
        torch.nn.init.normal_(p, std=0.05)
    codec, x = Codec(auto, 64), torch.zeros(2, 1, 64, 64)
    a, b = (codec.reconstruct(x, dict(scanner=torch.tensor([k, k]))) for k in (0, 1))
    assert (a - b).abs().max() > 1e-6
    assert list(
        required_conditions(auto, dict(scanner=torch.tensor([0]), age=torch.tensor([1.0])), 'cpu')
    ) == ['scanner']
    for call in (
        lambda: codec.encode(x),
        lambda: codec.decode(torch.zeros(1, 4, 8, 8)),
        lambda: codec.sample_stage1(1),
    ):
        with pytest.raises(ValueError, match='no value of scanner'):
            call()


def test_bytes_there_and_back():
    gray = torch.arange(256)
    assert to_bytes(gray / 127.5 - 1).tolist() == gray.tolist()
    # clipped, never wrapped round
    assert to_bytes(torch.tensor([-9.0, -1.001, 1.001, 9.0])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    'change, error, message',
    [
        (lambda p: p * 127.5, ValueError, 'Try images/127.5-1'),
        (lambda p: p[0], ValueError, 'shape (1, 64, 64)'),
        (lambda p: p[:0], ValueError, 'shape (0,'),
        (lambda p: p.expand(2, 3, 64, 64), ValueError, 'Expected (n, 1, 64, 64)'),
        (lambda p: p * float('nan'), ValueError, 'nan'),
        (lambda p: p.byte(), TypeError, 'torch.uint8'),
        (lambda p: p.numpy(), TypeError, 'Expected a float tensor'),
    ],
)
def test_what_is_no_picture(change, error, message):
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert check_images('f', images, 64) == 2
    with pytest.raises(error) as e:
        check_images('f', change(images), 64)
    assert message in str(e.value)


def test_devices():
    assert pick_device('cpu').type == 'cpu' and pick_device().type in ('cpu', 'cuda', 'mps')
    with pytest.raises(ValueError, match="pick_device: .*Try device='cpu'"):
        pick_device('gpu')
    for wrong in ('fp8', 'fp16', None):
        with pytest.raises(ValueError, match=f'pick_precision: precision={wrong!r}'):
            pick_precision(wrong, torch.device('cpu'))
