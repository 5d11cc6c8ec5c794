"""HTTP in general: bodies, ids, deadlines, errors, events and what is measured of them. Knows no request's fields."""
