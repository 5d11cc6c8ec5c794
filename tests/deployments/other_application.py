"""A second, foreign application beside ours, for test_draining.py."""

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0.05})
class Other:
    async def __call__(self, _request: object) -> str:
        return "other"


app = Other.bind()
