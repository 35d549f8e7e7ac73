"brainldm.files: volumes turned every way, faults of one file, the folder of caches."
import nibabel as nib
import numpy as np
import pytest
from test_data import float_head, make_volume, save, turned

from brainldm.files import DataFault, axial_picture, cache_folder, count_planes, decode_file, hash_picture, load_volume


def flipped(vol, affine, flips, order):
    "The same head in another storage order: axes reversed and permuted, affine changed to match."
    ornt = np.array([[order.index(i), -1 if i in flips else 1] for i in range(3)])
    out = nib.orientations.apply_orientation(vol, ornt)
    return out, affine @ nib.orientations.inv_ornt_aff(ornt, vol.shape)


@pytest.mark.parametrize('flips,order', [((), (0, 1, 2)), ((0,), (0, 1, 2)), ((1,), (0, 1, 2)), ((0, 1, 2), (0, 1, 2)), ((2,), (2, 0, 1)), ((0,), (1, 0, 2))])
def test_orientation_comes_from_the_affine(tmp_path, flips, order):
    vol = np.zeros((12, 14, 5), np.uint8)
    vol[2, 11] = 200                                            # left, front
    vol[2:10, 4:9] = np.arange(5)*10+50                         # height
    affine = np.diag([1.5, 1.5, 3, 1.])
    moved, moved_affine = flipped(vol, affine, flips, order)
    make_volume(tmp_path/'sub-01_T1w.nii.gz', moved, moved_affine)
    pictures, _ = decode_file(tmp_path/'sub-01_T1w.nii.gz', [0, 4])
    assert pictures[0].shape==(14, 12)
    assert np.argwhere(pictures[0]==200).tolist()==[[2, 2]]    # front at the top, left on the left
    assert pictures[0][7, 5]==50 and pictures[1][7, 5]==90


def test_slightly_oblique_is_read(tmp_path):
    vol = float_head().astype(np.uint8)
    make_volume(tmp_path/'a.nii', vol, turned(8))
    assert (load_volume(tmp_path/'a.nii')[0]==vol).all()


def test_intensities(tmp_path):
    vol = float_head()*7.3
    make_volume(tmp_path/'a.nii.gz', vol, dtype=np.float32)
    got, clipped = load_volume(tmp_path/'a.nii.gz')
    top = np.percentile(vol[vol>0], 99.9)
    assert got.dtype==np.uint8 and np.abs(got-np.clip(vol/top, 0, 1)*255).max()<=.5+1e-3 and clipped<=.001
    raw = float_head().astype(np.uint8)
    make_volume(tmp_path/'b.nii.gz', raw)
    assert (load_volume(tmp_path/'b.nii.gz')[0]==raw).all()


def test_picture_and_volume_agree(tmp_path):
    vol = float_head().astype(np.uint8)
    make_volume(tmp_path/'a.nii.gz', vol)
    assert count_planes(tmp_path/'a.nii.gz')==5
    save(tmp_path/'a.png', axial_picture(vol, 3))
    one, two = (decode_file(tmp_path/name, [k])[0][0] for name, k in (('a.png', -1), ('a.nii.gz', 3)))
    assert hash_picture(one)==hash_picture(two)!=hash_picture(one.T)
    with pytest.raises(DataFault, match='5 planes') as e: decode_file(tmp_path/'a.nii.gz', [0, 5])
    assert e.value.kind=='planes'


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'x')); monkeypatch.delenv('BRAINLDM_CACHE', raising=False)
    assert cache_folder()==tmp_path/'x/brainldm'
    monkeypatch.setenv('BRAINLDM_CACHE', str(tmp_path/'y'))
    assert cache_folder()==tmp_path/'y' and cache_folder(tmp_path)==tmp_path
