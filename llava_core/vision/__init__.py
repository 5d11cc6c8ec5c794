"""Vision towers: uint8 tiles in, unprojected features out."""
