"""DICOM files become pictures: the few elements that a picture needs, one frame's values, and those as grey or colour.

Nothing that names a patient is read: header.py has the list of what is. Compressed frames are pydicom's work.
"""
