"""DICOM files for tests, made with pydicom, each with patient data planted wherever a file may hold it."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, Sequence
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

Values = npt.NDArray[Any]
# No part of this name occurs anywhere else in the project.
PLANTED = "Quxley"


def data_set(values: Values, *, bits: int | None = None, photometric: str = "MONOCHROME2", **more: Any) -> Dataset:
    """Builds a data set from one frame (rows, columns) or several (frames, rows, columns); a colour `photometric` needs
    (..., 3)."""
    found = Dataset()
    found.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    found.SOPInstanceUID = generate_uid()
    found.Modality = "DX"
    _plant(found)
    samples = 3 if photometric.startswith(("RGB", "YBR")) else 1
    frames = values if values.ndim == (4 if samples == 3 else 3) else values[None]
    found.NumberOfFrames = len(frames)
    found.Rows, found.Columns = frames.shape[1:3]
    found.SamplesPerPixel, found.PhotometricInterpretation = samples, photometric
    if samples == 3:
        found.PlanarConfiguration = 0
    found.BitsAllocated = values.dtype.itemsize * 8
    found.BitsStored = bits or found.BitsAllocated
    found.HighBit = found.BitsStored - 1
    found.PixelRepresentation = int(values.dtype.kind == "i")
    stored = values.tobytes()
    found.PixelData = stored + b"\0" * (len(stored) % 2)
    found["PixelData"].VR = "OB" if values.dtype.itemsize == 1 else "OW"
    for name, value in more.items():
        setattr(found, name, value)
    return found


def _plant(found: Dataset) -> None:
    found.PatientName = f"{PLANTED}^Name"
    found.PatientID = f"{PLANTED}-1"
    found.PatientComments = f"{PLANTED} comment"
    found.ImageComments = f"{PLANTED} image comment"
    found.InstitutionName = f"{PLANTED} clinic"
    found.SpecificCharacterSet = f"{PLANTED} SET".upper()
    block = found.private_block(0x0011, f"{PLANTED} creator", create=True)
    block.add_new(0x01, "LO", f"{PLANTED} private")
    inner = Dataset()
    inner.PatientName = f"{PLANTED}^Nested"
    found.OtherPatientIDsSequence = Sequence([inner])
    found.WindowCenterWidthExplanation = f"{PLANTED} window"


@contextlib.contextmanager
def _unheeded() -> Iterator[None]:
    """Silences pydicom's warning, which repeats the planted text because it is not a valid character set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def written(found: Dataset, *, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """Writes the file. `syntax` is how its elements are written and how its pixels are declared to be encoded."""
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = syntax
    found.file_meta.MediaStorageSOPClassUID = found.SOPClassUID
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID
    buffer = io.BytesIO()
    with _unheeded():
        found.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicom(values: Values, *, syntax: str = ExplicitVRLittleEndian, **more: Any) -> bytes:
    """Writes these values to an uncompressed file."""
    return written(data_set(values, **more), syntax=syntax)


def implicit(values: Values, **more: Any) -> bytes:
    return dicom(values, syntax=ImplicitVRLittleEndian, **more)


def compressed(values: Values, syntax: str, **more: Any) -> bytes:
    """Compresses with pydicom's own encoders."""
    found = data_set(values, **more)
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    with _unheeded():
        found.compress(syntax, generate_instance_uid=False)
    return written(found, syntax=syntax)


def with_frames(found: Dataset, frames: list[bytes], syntax: str) -> bytes:
    """Writes a file with these bytes as its compressed frames, valid or not."""
    found.PixelData = encapsulate(frames)
    found["PixelData"].VR = "OB"
    found["PixelData"].is_undefined_length = True
    return written(found, syntax=syntax)


def lossless_jpeg(values: Values, folder: Path, **more: Any) -> bytes:
    """Compresses with GDCM, because pydicom has no encoder for lossless JPEG."""
    import gdcm

    plain, packed = folder / "plain.dcm", folder / "packed.dcm"
    plain.write_bytes(dicom(values, **more))
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(plain))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(packed))
    assert writer.Write()
    return packed.read_bytes()


def radiograph(rows: int = 48, columns: int = 40, *, bits: int = 12) -> Values:
    """Returns a smooth picture that covers every quarter of its value range."""
    y, x = np.mgrid[0:rows, 0:columns]
    top: int = 2**bits - 1
    return ((y * 3 + x * 7) % (rows + columns) * top // (rows + columns - 1)).astype(np.uint16)
