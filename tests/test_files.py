"brainldm.engineering.files: volumes turned every way, faults of one file, the folder of caches."

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from test_data import float_head, make_volume, save, turned

from brainldm.engineering.checks import DataFault
from brainldm.engineering.files import (
    axial_slice,
    cache_folder,
    count_planes,
    decode_file,
    hash_image,
    load_volume,
    read_gray_image,
    scale_to_bytes,
)


def flipped(vol, affine, flips, order):
    "The same head in another storage order: axes reversed and permuted, affine changed to match."
    ornt = np.array([[order.index(i), -1 if i in flips else 1] for i in range(3)])
    out = nib.orientations.apply_orientation(vol, ornt)
    return out, affine @ nib.orientations.inv_ornt_aff(ornt, vol.shape)


@pytest.mark.parametrize(
    'flips,order',
    [
        ((), (0, 1, 2)),
        ((0,), (0, 1, 2)),
        ((1,), (0, 1, 2)),
        ((0, 1, 2), (0, 1, 2)),
        ((2,), (2, 0, 1)),
        ((0,), (1, 0, 2)),
    ],
)
def test_orientation_comes_from_the_affine(tmp_path, flips, order):
    vol = np.zeros((12, 14, 5), np.uint8)
    vol[2, 11] = 200  # left, front
    vol[2:10, 4:9] = np.arange(5) * 10 + 50  # height
    affine = np.diag([1.5, 1.5, 3, 1.0])
    moved, moved_affine = flipped(vol, affine, flips, order)
    make_volume(tmp_path / 'sub-01_T1w.nii.gz', moved, moved_affine)
    images, _ = decode_file(tmp_path / 'sub-01_T1w.nii.gz', [0, 4])
    assert images[0].shape == (14, 12)
    # front at the top, left on the left
    assert np.argwhere(images[0] == 200).tolist() == [[2, 2]]
    assert images[0][7, 5] == 50 and images[1][7, 5] == 90


def test_slightly_oblique_is_read(tmp_path):
    vol = float_head().astype(np.uint8)
    make_volume(tmp_path / 'a.nii', vol, turned(8))
    assert (load_volume(tmp_path / 'a.nii')[0] == vol).all()


def test_intensities(tmp_path):
    vol = float_head() * 7.3
    make_volume(tmp_path / 'a.nii.gz', vol, dtype=np.float32)
    got, done = load_volume(tmp_path / 'a.nii.gz')
    top = np.percentile(vol[vol > 0], 99.9)
    assert (
        got.dtype == np.uint8
        and np.abs(got - np.clip(vol / top, 0, 1) * 255).max() <= 0.5 + 1e-3
        and done['clipped'] <= 0.001
    )
    raw = float_head().astype(np.uint8)
    make_volume(tmp_path / 'b.nii.gz', raw)
    assert (load_volume(tmp_path / 'b.nii.gz')[0] == raw).all()


def test_picture_and_volume_agree(tmp_path):
    vol = float_head().astype(np.uint8)
    make_volume(tmp_path / 'a.nii.gz', vol)
    assert count_planes(tmp_path / 'a.nii.gz') == 5
    save(tmp_path / 'a.png', axial_slice(vol, 3))
    one, two = (
        decode_file(tmp_path / name, [k])[0][0] for name, k in (('a.png', -1), ('a.nii.gz', 3))
    )
    assert hash_image(one) == hash_image(two) != hash_image(one.T)
    with pytest.raises(DataFault, match='5 planes') as e:
        decode_file(tmp_path / 'a.nii.gz', [0, 5])
    assert e.value.kind == 'planes'


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'x'))
    monkeypatch.delenv('BRAINLDM_CACHE', raising=False)
    assert cache_folder() == tmp_path / 'x/brainldm'
    monkeypatch.setenv('BRAINLDM_CACHE', str(tmp_path / 'y'))
    assert cache_folder() == tmp_path / 'y' and cache_folder(tmp_path) == tmp_path


# ---- intensities


def head(seed=0, shape=(30, 36, 9)):
    "An ellipsoid of 600 to 1000, 0 around it."
    gen = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing='ij')
    return ((x / 0.8) ** 2 + (y / 0.85) ** 2 + (z / 1.3) ** 2 < 1) * (
        600 + 400 * gen.random(shape)
    ).astype(np.float32)


def test_nan_around_the_brain_is_background():
    vol = head()
    got, done = scale_to_bytes(np.where(vol > 0, vol, np.nan))
    assert (got == scale_to_bytes(vol)[0]).all() and done['nan'] == (vol == 0).sum()
    gap = vol.copy()
    gap[14:16, :20] = 0  # a fissure that opens to the back
    assert scale_to_bytes(np.where(gap > 0, gap, np.nan))[1]['nan'] == (gap == 0).sum()
    # the field of view of a resampling, beside a background of 0
    edge = vol.copy()
    edge[0] = np.nan
    assert scale_to_bytes(edge)[1]['nan'] == 36 * 9


@pytest.mark.parametrize(
    'where',
    [
        np.s_[15, 18, 4],
        np.s_[12:18, 12:20, 3:6],
        np.s_[15:18, 15:18, 0],
        np.s_[:, :, 4],
        np.s_[:, :, 3:6],
        np.s_[:, 18],
        np.s_[12:16],
    ],
)
@pytest.mark.parametrize('around', [0, np.nan])
def test_nan_in_the_brain_is_a_fault(where, around):
    vol = head()
    vol[vol == 0] = around
    vol[where] = np.nan
    with pytest.raises(DataFault, match='inside the brain') as e:
        scale_to_bytes(vol)
    assert e.value.kind == 'nan'


def test_infinite_is_a_fault_wherever_it_is():
    vol = head()
    vol[0, 0, 0] = np.inf
    with pytest.raises(DataFault, match='infinite'):
        scale_to_bytes(vol)


@pytest.mark.parametrize('ring', ['everywhere and small', 'at the edge and deep'])
def test_ringing_is_weighed_by_its_size(ring):
    vol, gen = head(), np.random.default_rng(1)
    # 1 % of the bright end, in all the background
    if ring == 'everywhere and small':
        bad = vol - (vol == 0) * gen.random(vol.shape) * 9
    else:
        bad = vol.copy()
        bad[:3, ::6, ::4] = -80  # 8 %, in a few voxels
    got, done = scale_to_bytes(bad)
    assert (got == scale_to_bytes(vol)[0]).all() and 0.005 < done['negative'] < 0.1


@pytest.mark.parametrize(
    'normalize',
    [
        lambda v: (v - v.mean()) / v.std(),
        lambda v: np.where(v > 0, (v - v[v > 0].mean()) / v[v > 0].std(), 0),
        lambda v: v / v.max() * 2 - 1,
        lambda v: v - 100,
    ],
)
def test_a_normalized_volume_is_refused(normalize):
    with pytest.raises(DataFault, match='before it is normalized') as e:
        scale_to_bytes(normalize(head()))
    assert e.value.kind == 'negative'


@pytest.mark.parametrize('suffix', ['png', 'jpg'])
@pytest.mark.parametrize(
    'tag, undo',
    [
        (2, np.fliplr),
        (3, lambda o: np.rot90(o, 2)),
        (4, np.flipud),
        (6, lambda o: np.rot90(o, -1)),
        (8, np.rot90),
        (1, lambda o: o),
    ],
)
def test_exif_turns_are_obeyed(tmp_path, suffix, tag, undo):
    stored = np.arange(40 * 24, dtype=np.uint8).reshape(40, 24) // 4 * 4
    exif = Image.Exif()
    exif[0x0112] = tag
    save(
        tmp_path / f'a.{suffix}',
        stored,
        exif=exif,
        **(dict(quality=100) if suffix == 'jpg' else {}),
    )
    save(tmp_path / f'b.{suffix}', stored, **(dict(quality=100) if suffix == 'jpg' else {}))
    image, turned = read_gray_image(tmp_path / f'a.{suffix}')
    assert (image == undo(read_gray_image(tmp_path / f'b.{suffix}')[0])).all() and turned == (
        tag != 1
    )
