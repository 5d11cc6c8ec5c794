"""The model as an online service: four Ray Serve deployments of plain classes behind one HTTP surface.

`app.py` alone knows Serve's deployments and replicas. Never imports `cluster`.
"""
