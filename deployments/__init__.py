"""The model as an online service: four Ray Serve deployments of plain classes behind one HTTP surface.

`app.py` is the only file that knows `serve.deployment`, `bind` and `ingress`. A request goes through `gateway.py`,
`http/`, `access/` and `openai_api/` (or `llava_protocol/`) to `graph/`, which calls `preprocessor.py`,
`vision_encoder.py` and `generator.py`, one after the other; or through `upstreams/` to another server. `outgoing/` is
for addresses that a request names, `settings/` for what serve_config.yaml may say. `commands/` and `launch/` start all
of it, and `page/` asks it like any other client. Never imports `cluster`.
"""
