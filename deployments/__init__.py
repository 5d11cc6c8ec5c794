"""The model as an online service: four Ray Serve deployments of plain classes behind one HTTP surface.

`app.py` alone knows Serve's deployments and replicas. A request goes through `gateway.py`, `http/`, `access/` and
`openai_api/` to `graph/`, which calls `preprocessor.py`, `vision_encoder.py` and `generator.py`, one after the other.
`commands/` and `launch/` start all of it. Never imports `cluster`.
"""
