"""Pictures: safe decoding, geometry, and preprocessing to the pixel tiles a vision tower reads."""
