"""Heads are found in every layout that people have, one a visit, and read with an affine that can
be trusted; what is left out is said."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from brainldm.engineering.checks import DataFault
from brainldm.engineering.configs import SourceOptions
from brainldm.engineering.sources import (
    find_contrast,
    find_heads,
    natural,
    oasis_axes,
    read_head,
    read_volume,
    set_axes,
)

SHAPE = (5, 6, 7)  # unequal sides catch swapped axes
VOL = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


def put(root, *paths, shape=SHAPE):
    "Write a tiny volume at each path, in the form that its name says."
    vol = np.resize(VOL, shape)
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.name.endswith(".mgz"):
            nib.save(nib.MGHImage(vol.astype(np.int32), np.eye(4)), file)
        elif file.suffix == ".hdr":
            img = nib.AnalyzeImage(vol, np.diag([1, 1, 1.25, 1]))
            nib.save(img, file)
        else:
            nib.save(nib.Nifti1Image(vol, np.eye(4)), file)
    return root


def put_dicom(folder, description="MPRAGE", patient="007", number=3, modality="MR", num=6):
    "Write a tiny axial series of slices 2 mm apart."
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = (
        generate_uid(entropy_srcs=[patient, o]) for o in ("a", description, "c")
    )
    for k in range(num):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(k)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.PatientID, ds.PatientName, ds.Modality = patient, "nobody", modality
        ds.StudyDate, ds.StudyTime, ds.Manufacturer = "20200102", "101010", "SIEMENS"
        ds.SeriesDescription = ds.ProtocolName = description
        ds.SeriesNumber, ds.InstanceNumber, ds.AcquisitionNumber = number, k + 1, 1
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
        ds.MRAcquisitionType, ds.ScanningSequence, ds.SequenceVariant = "3D", "GR", "SP"
        ds.EchoTime, ds.RepetitionTime, ds.MagneticFieldStrength = 3.0, 2300.0, 3.0
        ds.SliceThickness, ds.SpacingBetweenSlices, ds.PixelSpacing = 2.0, 2.0, [1.0, 1.5]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [-10.0, -12.0, -5.0 + 2 * k]
        ds.SliceLocation = -5.0 + 2 * k
        ds.Rows, ds.Columns = 16, 12
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = (np.arange(16 * 12, dtype=np.uint16).reshape(16, 12) + 100 * k).tobytes()
        pydicom.dcmwrite(folder / f"IM{k:04d}.dcm", ds, enforce_file_format=True)


def told(heads):
    "Rows as short tuples."
    rows = heads.table[["subject", "session", "path"]]
    return [tuple(o) for o in rows.itertuples(index=False)]


def test_bids_raw_takes_the_first_session_of_each(tmp_path):
    anat = "sub-{0}/ses-{1}/anat/sub-{0}_ses-{1}"
    for subject, visit in (("01", "M00"), ("01", "M12"), ("02", "M00")):
        put(tmp_path, anat.format(subject, visit) + "_T1w.nii.gz")
        put(tmp_path, anat.format(subject, visit) + "_FLAIR.nii.gz")
    put(tmp_path, "sub-02/ses-M00/anat/sub-02_ses-M00_run-2_T1w.nii.gz")
    put(tmp_path, "sub-02/ses-M00/dwi/sub-02_ses-M00_dwi.nii.gz")
    put(tmp_path, "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz")
    heads = find_heads(tmp_path)
    assert told(heads) == [
        ("sub-01", "ses-M00", anat.format("01", "M00") + "_T1w.nii.gz"),
        ("sub-02", "ses-M00", anat.format("02", "M00") + "_T1w.nii.gz"),
    ]
    assert heads.layout == "BIDS, raw"
    notes = " ".join(heads.notes)
    assert "1 preprocessed volumes" in notes and "1 heads of other sessions than the first" in notes
    assert "4 volumes other than T1w" in notes and "1 repeats of a visit" in notes
    last = find_heads(tmp_path, SourceOptions(session="last")).table
    assert last.session.tolist() == ["ses-M12", "ses-M00"]
    every = find_heads(tmp_path, SourceOptions(session="all")).table
    assert every.session.tolist() == ["ses-M00", "ses-M12", "ses-M00"]
    flair = find_heads(tmp_path, SourceOptions(suffix="FLAIR")).table
    assert flair.path.str.contains("FLAIR").all() and len(flair) == 2
    with pytest.raises(ValueError, match="session='second'"):
        find_heads(tmp_path, SourceOptions(session="second"))


def test_fmriprep_brings_its_mask(tmp_path):
    for space in ("", "_space-MNI152NLin2009cAsym_res-1"):
        for end in ("_desc-preproc_T1w", "_desc-brain_mask", "_dseg", "_label-GM_probseg"):
            put(tmp_path, f"fmriprep/sub-01/anat/sub-01{space}{end}.nii.gz")
    put(tmp_path, "fmriprep/sourcedata/freesurfer/sub-01/mri/T1.mgz")
    heads = find_heads(tmp_path)
    assert heads.layout == "BIDS derivatives"
    row = heads.table.iloc[0]
    assert len(heads.table) == 1 and row.path.endswith("sub-01_desc-preproc_T1w.nii.gz")
    assert row["mask"] == "fmriprep/sub-01/anat/sub-01_desc-brain_mask.nii.gz"
    other = find_heads(tmp_path, SourceOptions(space="MNI152NLin2009cAsym")).table.iloc[0]
    assert "space-MNI152" in other.path and "space-MNI152" in other["mask"]
    with pytest.raises(ValueError, match="MNI152NLin2009cAsym. Expected one of them"):
        find_heads(tmp_path, SourceOptions(space="MNI"))


ADNI = "ADNI/002_S_0295/{}/{}_08_20_30.0/{}/ADNI_002_S_0295_MR_{}_Br_20070217_S13408_{}.nii"


def test_adni_tree_takes_one_scan_a_visit(tmp_path):
    rows = (
        ("MP-RAGE_REPEAT", "2006-04-18", "I45107"),
        ("MP-RAGE", "2006-04-18", "I45108"),
        ("MPR__GradWarp__B1_Correction__Mask", "2006-04-18", "I45109"),
        ("Axial_PD_T2_FSE", "2006-04-18", "I45110"),
        ("Field_Mapping", "2006-04-18", "I45111"),
        ("MP-RAGE", "2006-11-02", "I50000"),
    )
    for kind, day, image in rows:
        put(tmp_path, ADNI.format(kind, day, image, kind, image))
    heads = find_heads(tmp_path)
    row = heads.table.iloc[0]
    assert len(heads.table) == 1 and heads.layout == "ADNI download tree"
    assert (row.subject, row.session, row.image) == ("002_S_0295", "2006-04-18", "I45108")
    notes = " ".join(heads.notes)
    assert "label maps" in notes and "contrast T2" in notes and "no whole head" in notes
    assert find_heads(tmp_path, SourceOptions(session="last")).table.image[0] == "I50000"


def test_corrections_in_a_name_of_adni_are_no_maps(tmp_path):
    kind = "MPR__GradWarp__B1_Correction__N3__Scaled"
    put(tmp_path, f"ADNI_002_S_0295_MR_{kind}_Br_20070217_S13408_I45108.nii")
    assert find_heads(tmp_path).table.image[0] == "I45108"


def test_adni_tree_of_dicom(tmp_path):
    at = "ADNI/002_S_0295/{}/2006-04-18_08_20_30.0/{}"
    put_dicom(tmp_path / at.format("MP-RAGE", "I45108"), "MP-RAGE")
    put_dicom(tmp_path / at.format("3_Plane_Localizer", "I45100"), "3-plane localizer")
    heads = find_heads(tmp_path)
    row = heads.table.iloc[0]
    assert len(heads.table) == 1 and heads.layout == "DICOM, ADNI download tree"
    assert row.path == at.format("MP-RAGE", "I45108") and row.form == "dicom"
    assert (row.subject, row.session, row.image) == ("002_S_0295", "2006-04-18", "I45108")


def test_oasis_disc_takes_the_average_of_the_scans(tmp_path):
    for k in (1, 2):
        base = f"disc1/OAS1_000{k}_MR1"
        name = f"OAS1_000{k}_MR1_mpr"
        put(tmp_path, f"{base}/RAW/{name}-1_anon.hdr", f"{base}/RAW/{name}-2_anon.hdr")
        put(tmp_path, f"{base}/PROCESSED/MPRAGE/SUBJ_111/{name}_n4_anon_sbj_111.hdr")
        for end in ("t88_gfc", "t88_masked_gfc"):
            put(tmp_path, f"{base}/PROCESSED/MPRAGE/T88_111/{name}_n4_anon_111_{end}.hdr")
        put(tmp_path, f"{base}/FSL_SEG/{name}_n4_anon_111_t88_masked_gfc_fseg.hdr")
    heads = find_heads(tmp_path)
    assert heads.layout == "OASIS-1 disc (Analyze)"
    assert heads.table.subject.tolist() == ["OAS1_0001", "OAS1_0002"]
    assert heads.table.session.tolist() == ["MR1", "MR1"]
    assert heads.table.path.str.contains("sbj_111").all()
    assert "10 other files of visits whose best" in " ".join(heads.notes)
    img = read_head(tmp_path, heads.table.iloc[0], tmp_path)
    assert nib.aff2axcodes(img.affine) == ("A", "S", "L")
    np.testing.assert_array_equal(np.asanyarray(img.dataobj), VOL)
    np.testing.assert_allclose(img.header.get_zooms(), (1, 1, 1.25))
    for path in (tmp_path / "disc1").rglob("*sbj_111*"):
        path.unlink()
    raw = find_heads(tmp_path)
    assert raw.table.path.str.contains("mpr-1_anon").all()
    for path in (tmp_path / "disc1").rglob("*mpr-?_anon*"):
        path.unlink()
    atlas = find_heads(tmp_path).table
    assert atlas.path.str.contains("t88_gfc").all()
    assert nib.aff2axcodes(read_head(tmp_path, atlas.iloc[0], tmp_path).affine) == ("L", "A", "S")


def test_other_analyze_is_refused_with_the_remedy(tmp_path):
    put(tmp_path, "a01.hdr", "a02.hdr")
    (tmp_path / "a02.img").unlink()
    heads = find_heads(tmp_path)
    assert heads.table.path.tolist() == ["a01.hdr"]
    assert heads.faults.fault.tolist() == ["missing"]
    with pytest.raises(DataFault, match="does not say where left is"):
        read_head(tmp_path, heads.table.iloc[0], tmp_path)


def test_oasis_names_of_nifti(tmp_path):
    put(tmp_path, *(f"OAS2_0001_MR{k}_mpr-1.nii.gz" for k in (1, 2)), "OAS2_0002_MR1_mpr-1.nii.gz")
    heads = find_heads(tmp_path)
    assert heads.layout == "folder of volumes with names of OASIS"
    assert told(heads) == [
        ("OAS2_0001", "MR1", "OAS2_0001_MR1_mpr-1.nii.gz"),
        ("OAS2_0002", "MR1", "OAS2_0002_MR1_mpr-1.nii.gz"),
    ]


def test_freesurfer_brings_its_mask(tmp_path):
    for subject in ("bert", "fsaverage", "bert.long.base", "base"):
        put(tmp_path, *(f"{subject}/mri/{o}.mgz" for o in ("T1", "brainmask", "aseg", "norm")))
    put(tmp_path, "stripped/mri/norm.mgz")
    heads = find_heads(tmp_path)
    assert heads.layout == "FreeSurfer subjects folder"
    rows = heads.table.set_index("subject")
    assert rows.index.tolist() == ["bert", "stripped"]
    assert rows["mask"].tolist() == ["bert/mri/brainmask.mgz", "stripped/mri/norm.mgz"]
    assert "fsaverage" in " ".join(heads.notes) and "longitudinal" in " ".join(heads.notes)
    assert read_head(tmp_path, heads.table.iloc[0], tmp_path).shape == SHAPE
    alone = find_heads(tmp_path / "bert").table
    assert told(find_heads(tmp_path / "bert")) == [("bert", None, "mri/T1.mgz")]
    assert alone["mask"][0] == "mri/brainmask.mgz"


def test_cat12_takes_the_brain_and_leaves_the_tissues(tmp_path):
    names = ("wm", "mwp1", "mwp2", "p0", "wmi")
    for subject in ("sub-01", "sub-02"):
        put(tmp_path, *(f"mri/{o}{subject}_T1w.nii" for o in names), f"{subject}_T1w.nii")
    heads = find_heads(tmp_path)
    assert heads.layout == "CAT12" and heads.table.subject.tolist() == ["sub-01", "sub-02"]
    assert heads.table.path.tolist() == ["mri/wmsub-01_T1w.nii", "mri/wmsub-02_T1w.nii"]
    assert heads.table["mask"].tolist() == heads.table.path.tolist()
    assert "6 tissue maps" in " ".join(heads.notes)


def test_cat12_without_brains_names_the_remedy(tmp_path):
    put(tmp_path, "mri/mwp1a01.nii", "mri/mwp2a01.nii")
    with pytest.raises(ValueError, match="tissue maps such as mri/mwp1a01.nii"):
        find_heads(tmp_path)


def test_class_folders_in_any_case(tmp_path):
    put(tmp_path, "ad/p01.nii.gz", "ad/p02.nii.gz", "Nc/p03.nii.gz", "MCI/p04.nii.gz")
    heads = find_heads(tmp_path)
    assert heads.layout == "class folders, folder of volumes"
    rows = heads.table.set_index("subject")
    assert rows.diagnosis.to_dict() == dict(p01="ad", p02="ad", p03="Nc", p04="MCI")
    assert rows.split.isna().all()


def test_class_folders_with_splits(tmp_path):
    put(tmp_path, "Train/AD/p01/T1.nii.gz", "Train/NC/p02/T1.nii.gz", "VALID/AD/p03/T1.nii.gz")
    heads = find_heads(tmp_path)
    rows = heads.table.set_index("subject")
    assert rows.diagnosis.to_dict() == dict(p01="AD", p02="NC", p03="AD")
    assert rows.split.to_dict() == dict(p01="train", p02="train", p03="validate")
    assert heads.layout == "class folders in splits, one folder a subject"


def test_numbers_that_restart_in_each_class_are_different_subjects(tmp_path):
    put(tmp_path, *(f"{c}/{k:03d}.nii" for c in ("AD", "NC") for k in (1, 2)))
    assert find_heads(tmp_path).table.subject.tolist() == ["AD_001", "AD_002", "NC_001", "NC_002"]


def test_a_folder_that_is_no_class_is_none(tmp_path):
    put(tmp_path, *(f"site{c}/{c}{k:03d}.nii" for c in "AB" for k in range(10)))
    heads = find_heads(tmp_path)
    assert heads.table.diagnosis.isna().all() and heads.table.subject[0] == "A000"


def test_one_folder_a_subject(tmp_path):
    for subject in ("p10", "p9"):
        put(
            tmp_path, *(f"data/{subject}/anat/{o}.nii.gz" for o in ("T1", "T2", "FLAIR", "T1_mask"))
        )
    put(tmp_path, "data/p11/anat/brain.nii.gz", "data/p11/anat/T1.nii.gz")
    heads = find_heads(tmp_path)
    assert heads.layout == "one folder a subject"
    assert heads.table.subject.tolist() == ["p9", "p10", "p11"]  # as people count
    assert heads.table.path.str.endswith("/T1.nii.gz").all()
    notes = " ".join(heads.notes)
    assert "2 label maps" in notes and "2 heads of contrast T2" in notes and "FLAIR" in notes
    assert "do not say T1" in notes


def test_visits_of_one_subject_are_sessions(tmp_path):
    put(tmp_path, *(f"p{k}/{v}/T1.nii" for k in (1, 2) for v in ("m12", "bl", "m6")))
    heads = find_heads(tmp_path)
    assert told(heads) == [("p1", "bl", "p1/bl/T1.nii"), ("p2", "bl", "p2/bl/T1.nii")]
    every = find_heads(tmp_path, SourceOptions(session="all")).table
    assert every.session.tolist() == ["bl", "m6", "m12"] * 2
    assert told(find_heads(tmp_path / "p1")) == [("p1", "bl", "bl/T1.nii")]


def test_plain_folder(tmp_path):
    put(tmp_path, "A-01_T1.nii.gz", "A-02_T1.nii.gz", "dti_FA.nii.gz", "A-03_CT.nii.gz")
    heads = find_heads(tmp_path)
    assert heads.layout == "folder of volumes"
    assert heads.table.subject.tolist() == ["A-01", "A-02"]
    assert "heads of contrast CT left out: A-03_CT.nii.gz" in " ".join(heads.notes)
    only = find_heads(tmp_path, SourceOptions(only="*02*"))
    assert only.table.subject.tolist() == ["A-02"]
    with pytest.raises(ValueError, match="matches none of 4 heads"):
        find_heads(tmp_path, SourceOptions(only="*T9*"))


def test_every_volume_is_taken_or_its_leaving_is_said(tmp_path):
    put(tmp_path, *(f"p{k}/{o}.nii" for k in (1, 2) for o in ("T1", "T1_run-2", "T2", "seg", "x")))
    put(tmp_path, "p3/bl/T1.nii", "p3/m12/T1.nii", "p3/m12/biasfield.nii", "p3/bl/localizer.nii")
    heads = find_heads(tmp_path)
    left = sum(int(o.split()[0]) for o in heads.notes)
    assert left + len(heads.table) == 14 and len(heads.table) == 3, str(heads)


@pytest.mark.parametrize(
    "paths",
    [
        ("bert/mri/T1.mgz", "bert/mri/brainmask.mgz", "bert/mri/aseg.mgz", "bert/mri/nu.mgz"),
        ("mri/wmp1.nii", "mri/mwp1p1.nii", "mri/wmip1.nii", "p1.nii"),
        ("sub-1/anat/sub-1_T1w.nii.gz", "sub-1/func/sub-1_bold.nii.gz", "x/wmsub-1_T1w.nii"),
        ("OAS1_0001_MR1_mpr-1_anon.hdr", "OAS1_0001_MR1_mpr-2_anon.hdr", "other.nii"),
    ],
)
def test_every_volume_of_a_known_layout_too(tmp_path, paths):
    heads = find_heads(put(tmp_path, *paths))
    masks = set(heads.table["mask"].dropna()) - set(heads.table.path)
    left = sum(int(o.split()[0]) for o in heads.notes)
    assert left + len(heads.table) + len(masks) == len(paths), str(heads)


def test_trees_of_loni_beside_adni(tmp_path):
    at = "AIBL/1023/MPRAGE_ADNI_confirmed/{0}_10_10_10.0/{1}/AIBL_1023_MR_x_Br_1_S1_{1}.nii"
    put(tmp_path, at.format("2010-01-02", "I12345"), at.format("2011-07-02", "I22345"))
    heads = find_heads(tmp_path, SourceOptions(session="all"))
    assert heads.layout == "download tree of LONI" and set(heads.table.subject) == {"1023"}
    assert heads.table.session.tolist() == ["2010-01-02", "2011-07-02"]
    assert heads.table.image.tolist() == ["I12345", "I22345"]


def test_only_keeps_the_mask(tmp_path):
    put(tmp_path, *(f"sub-01/anat/sub-01_desc-{o}.nii.gz" for o in ("preproc_T1w", "brain_mask")))
    heads = find_heads(tmp_path, SourceOptions(only="*_T1w*"))
    assert heads.table["mask"].tolist() == ["sub-01/anat/sub-01_desc-brain_mask.nii.gz"]


def test_images_are_for_check(tmp_path):
    (tmp_path / "a_1.png").write_bytes(b"x")
    with pytest.raises(
        ValueError, match="1 files of other forms.*give the folder to `brainldm check`"
    ):
        find_heads(tmp_path)


def test_the_whole_head_is_taken_before_its_brain(tmp_path):
    put(tmp_path, "p01.nii.gz", "p01_brain.nii.gz", "p02_brain.nii.gz")
    heads = find_heads(tmp_path)
    assert told(heads) == [("p01", None, "p01.nii.gz"), ("p02", None, "p02_brain.nii.gz")]


def test_folders_of_contrasts(tmp_path):
    put(tmp_path, "T1/p01.nii", "T2/p01.nii", "PD/p01.nii", "T1/p02.nii")
    assert find_heads(tmp_path).table.path.tolist() == ["T1/p01.nii", "T1/p02.nii"]


def test_brats_label_map_is_no_head(tmp_path):
    name = "BraTS-GLI-0000{0}-000/BraTS-GLI-0000{0}-000-{1}.nii.gz"
    for k in (1, 2):
        put(tmp_path, *(name.format(k, o) for o in ("t1n", "t1c", "t2w", "t2f", "seg")))
    heads = find_heads(tmp_path)
    assert heads.table.path.tolist() == [name.format(k, "t1n") for k in (1, 2)]
    assert "2 label maps" in " ".join(heads.notes)


def test_nothing_that_fits_is_said(tmp_path):
    put(tmp_path, "p01_CT.nii")
    with pytest.raises(ValueError, match="no head of T1w; 1 heads of contrast CT"):
        find_heads(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds nothing"):
        find_heads(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        find_heads(tmp_path / "p01_CT.nii")


def test_dicom_of_one_folder_a_subject_is_converted(tmp_path):
    put_dicom(tmp_path / "raw/p01/A", "t1_mprage_sag", patient="x1", number=4)
    put_dicom(tmp_path / "raw/p01/B", "t2_tse", patient="x1", number=5)
    put_dicom(tmp_path / "raw/p02/A", "t1_mprage_sag", patient="x2")
    put_dicom(tmp_path / "raw/p03/A", "Head", patient="x3", modality="CT")
    before = sorted((o, o.stat().st_mtime_ns) for o in tmp_path.rglob("*"))
    heads = find_heads(tmp_path / "raw")
    assert told(heads) == [("p01", None, "p01/A"), ("p02", None, "p02/A")]
    assert "DICOM that are no T1 (no MR: CT, t2_tse)" in " ".join(heads.notes)
    work = tmp_path.parent / f"{tmp_path.name}-work"
    work.mkdir()
    img = read_head(tmp_path / "raw", heads.table.iloc[0], work)
    assert img.shape == (12, 16, 6)
    np.testing.assert_allclose(img.header.get_zooms(), (1.5, 1, 2))
    # column 0, row 0 of the first slice lies at (-10, -12, -5) of the scanner, left and back up
    place = np.linalg.inv(img.affine) @ [10, 12, -5, 1]
    assert np.asanyarray(img.dataobj)[tuple(place[:3].round().astype(int))] == 0
    assert sorted((o, o.stat().st_mtime_ns) for o in tmp_path.rglob("*")) == before


def test_dicom_series_of_one_folder_are_told_apart(tmp_path):
    put_dicom(tmp_path / "p01", "t2_tse", number=2)
    for file in (tmp_path / "p01").iterdir():
        file.rename(file.with_name("a" + file.stem))  # no suffix
    put_dicom(tmp_path / "p01", "t1_mprage", number=3)
    heads = find_heads(tmp_path)
    assert heads.table.kind.tolist() == ["t1_mprage"]
    assert "p01 has 2 series: t1_mprage is taken" in heads.notes
    (tmp_path / "work").mkdir()
    img = read_head(tmp_path, heads.table.iloc[0], tmp_path / "work")
    assert img.shape == (12, 16, 6)


def test_dicom_without_a_folder_is_named_by_its_header(tmp_path):
    put_dicom(tmp_path / "dicom", "t1")
    heads = find_heads(tmp_path / "dicom")
    assert told(heads) == [("007", None, ".")]
    assert heads.layout == "DICOM, folder of volumes, subjects named by PatientID"


def test_dicom_below_classes_takes_the_series_of_each_visit(tmp_path):
    for c, p in (("AD", "p1"), ("NC", "p2")):
        put_dicom(tmp_path / c / p / "SE1", "Localizer", patient=p, number=1)
        put_dicom(tmp_path / c / p / "SE2", "Sag 3D", patient=p, number=2)
        put_dicom(tmp_path / c / p / "SE3", "MPRAGE", patient=p, number=3)
        put_dicom(tmp_path / c / p / "SE4", "report", patient=p, number=4, modality="SR")
    heads = find_heads(tmp_path)
    assert [o[::2] for o in told(heads)] == [("p1", "AD/p1/SE3"), ("p2", "NC/p2/SE3")]
    assert heads.table.diagnosis.tolist() == ["AD", "NC"]


def test_series_with_a_gap_is_a_fault(tmp_path):
    put_dicom(tmp_path / "p1", "t1", num=10)
    for k in (3, 4):
        (tmp_path / f"p1/IM000{k}.dcm").unlink()
    (tmp_path / "work").mkdir()
    with pytest.raises(DataFault, match="slices are missing"):
        read_head(tmp_path, dict(path="p1", form="dicom", kind="t1"), tmp_path / "work")
    (tmp_path / "p2").mkdir()
    with pytest.raises(DataFault, match="dcm2niix made no volume"):
        read_head(tmp_path, dict(path="p2", form="dicom", kind="t1"), tmp_path / "work")


def test_series_that_is_not_among_several_is_a_fault(tmp_path):
    put_dicom(tmp_path / "p1", "t1", number=1)
    for file in (tmp_path / "p1").iterdir():
        file.rename(file.with_name("b" + file.name))
    put_dicom(tmp_path / "p1", "t2", number=2)
    (tmp_path / "work").mkdir()
    with pytest.raises(DataFault, match="1_t1.nii, 2_t2.nii; 0 of them are mprage"):
        read_head(tmp_path, dict(path="p1", form="dicom", kind="mprage"), tmp_path / "work")


def test_upper_case_suffixes(tmp_path):
    put(tmp_path, "p1.nii.gz", "p2.nii")
    (tmp_path / "p1.nii.gz").rename(tmp_path / "p1.NII.GZ")
    (tmp_path / "p2.nii").rename(tmp_path / "p2.NII")
    heads = find_heads(tmp_path)
    assert heads.table.subject.tolist() == ["p1", "p2"]
    for _, row in heads.table.iterrows():
        assert read_head(tmp_path, row, tmp_path).shape == SHAPE


def test_dicom_of_several_patients_in_one_folder(tmp_path):
    put_dicom(tmp_path / "all", "t1", patient="1")
    for file in (tmp_path / "all").iterdir():
        file.rename(file.with_name("b" + file.name))
    put_dicom(tmp_path / "all", "t1 too", patient="2")
    heads = find_heads(tmp_path)
    assert not len(heads.table) and heads.faults.fault.tolist() == ["subject"]


def test_pointers_name_their_remedy(tmp_path):
    put(tmp_path, "p01.nii.gz")
    (tmp_path / "p02.nii.gz").symlink_to(".git/annex/objects/a/b/MD5E-s1--x.nii.gz")
    (tmp_path / "p03.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1")
    (tmp_path / "p04.nii.gz").write_text("")
    heads = find_heads(tmp_path)
    assert heads.table.path.tolist() == ["p01.nii.gz"]
    said = heads.faults.set_index("path").detail
    assert "datalad get" in said["p02.nii.gz"] and "git lfs pull" in said["p03.nii.gz"]
    assert "0 bytes" in said["p04.nii.gz"]
    assert "fault: pointer: p02.nii.gz" in str(heads)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(shape=(5, 6, 7, 2)), "one 3-D volume"),
        (dict(code=0), "sform and qform code are 0"),
        (dict(affine=np.diag([1.0, 1, 0, 1])), "affine has no volume"),
        (dict(dtype=np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])), "gray values"),
    ],
)
def test_volumes_that_cannot_be_trusted(tmp_path, change, said):
    vol = np.zeros(change.get("shape", SHAPE), change.get("dtype", np.float32))
    img = nib.Nifti1Image(vol, np.eye(4))
    img.set_sform(change.get("affine", np.eye(4)), change.get("code", 1))
    img.set_qform(None, 0)
    nib.save(img, tmp_path / "p01.nii")
    with pytest.raises(DataFault, match=said):
        read_head(tmp_path, dict(path="p01.nii", form="nifti"), tmp_path)


def test_nifti_of_oasis_without_codes_has_known_axes(tmp_path):
    name = "OAS1_0001_MR1_mpr_n4_anon_sbj_111.nii.gz"
    img = nib.Nifti1Image(VOL, np.eye(4))
    img.set_sform(None, 0)
    img.set_qform(None, 0)
    nib.save(img, tmp_path / name)
    heads = find_heads(tmp_path)
    img = read_head(tmp_path, heads.table.iloc[0], tmp_path)
    assert nib.aff2axcodes(img.affine) == ("A", "S", "L")


def test_truncated_head_is_a_fault(tmp_path):
    for name in ("p01.nii.gz", "p02.nii", "p03.mgz"):
        put(tmp_path, name, shape=(50, 60, 70))
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataFault, match="cannot be read|cannot open it"):
            read_head(tmp_path, dict(path=name, form="nifti"), tmp_path)


def test_half_of_a_pair_may_be_a_pointer(tmp_path):
    put(tmp_path, "OAS1_0001_MR1_mpr-1_anon.hdr")
    (tmp_path / "OAS1_0001_MR1_mpr-1_anon.img").write_text(
        "version https://git-lfs.github.com/spec/v1"
    )
    heads = find_heads(tmp_path)
    assert not len(heads.table) and "git lfs pull" in heads.faults.detail[0]


def test_mask_is_read_like_a_head(tmp_path):
    put(tmp_path, "mri/T1.mgz", "mri/brainmask.mgz")
    row = find_heads(tmp_path).table.iloc[0]
    assert read_volume(tmp_path / row["mask"]).shape == SHAPE


def test_only_space_is_taken(tmp_path):
    base = "sub-01/anat/sub-01_space-MNI_res-{}_desc-"
    put(
        tmp_path,
        *(base.format(k) + o for k in (1, 2) for o in ("preproc_T1w.nii", "brain_mask.nii")),
    )
    heads = find_heads(tmp_path)
    assert heads.table.path.tolist() == [base.format(1) + "preproc_T1w.nii"]
    assert heads.table["mask"].tolist() == [base.format(1) + "brain_mask.nii"]
    assert "1 heads of other spaces than space MNI at res-1" in " ".join(heads.notes)


def test_hcp_folder(tmp_path):
    names = (
        "T1w_acpc_dc_restore T1w_acpc_dc_restore_brain BiasField_acpc_dc ribbon T2w_acpc_dc_restore"
    )
    put(tmp_path, *(f"10030{k}/T1w/{o}.nii.gz" for k in (1, 2) for o in names.split()))
    heads = find_heads(tmp_path)
    assert heads.table.subject.tolist() == ["100301", "100302"]
    assert heads.table.path.str.endswith("T1w_acpc_dc_restore.nii.gz").all()


def test_names_that_do_not_print_are_faults(tmp_path):
    put(tmp_path, "p01.nii", "p\n02.nii")
    heads = find_heads(tmp_path)
    assert heads.table.subject.tolist() == ["p01"] and heads.faults.fault.tolist() == ["name"]


def test_class_in_two_spellings_is_one(tmp_path):
    put(tmp_path, "train/AD/p1.nii", "train/NC/p2.nii", "val/ad/p3.nii", "val/nc/p4.nii")
    assert find_heads(tmp_path).table.diagnosis.tolist() == ["AD", "NC", "AD", "NC"]


def test_one_frame_is_squeezed(tmp_path):
    put(tmp_path, "p01.nii.gz", shape=(5, 6, 7, 1))
    assert read_head(tmp_path, dict(path="p01.nii.gz", form="nifti"), tmp_path).shape == SHAPE


def test_axes_of_oasis():
    affine = set_axes((256, 256, 160), (1, 1, 1), "ASL")
    # what Clinica writes for the same files, but for the half voxel of the center
    clinica = np.array([[0, 0, -1, 80], [1, 0, 0, -128], [0, 1, 0, -128], [0, 0, 0, 1.0]])
    assert np.abs(affine - clinica).max() == 0.5
    assert oasis_axes("x/OAS1_0001_MR1_mpr-1_anon.hdr") == (1, "ASL")
    assert oasis_axes("OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc_fseg.hdr") is None


@pytest.mark.parametrize(
    "text, contrast",
    [
        ("t1_mprage_sag_p2_iso", "T1"),
        ("MP-RAGE-REPEAT", "T1"),
        ("Accelerated Sagittal MPRAGE", "T1"),
        ("MPRAGE_GRAPPA2", "T1"),
        ("SAG IR-SPGR", "T1"),
        ("Ax T2 FLAIR", "FLAIR"),
        ("ep2d_bold_rest", "BOLD"),
        ("3-plane localizer", "no whole head"),
        ("Sagittal 3D", None),
        (None, None),
    ],
)
def test_contrast_of_a_description(text, contrast):
    assert find_contrast(text) == contrast


def test_order_is_as_people_count():
    assert sorted(["m12", "m6", "bl", "m24"], key=natural) == ["bl", "m6", "m12", "m24"]


def test_importing_is_light():
    code = (
        "import sys, brainldm.engineering.sources;"
        "print([o for o in ('torch', 'SimpleITK', 'pydicom', 'dcm2niix') if o in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
