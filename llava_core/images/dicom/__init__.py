"""Turns DICOM files into pictures: the few elements needed, one frame's values, and their rendering in grey or colour.

Nothing that identifies a patient is read: header.py lists the elements that are. pydicom decodes compressed frames.
"""
