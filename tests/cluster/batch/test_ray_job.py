"""Ray's message when it cannot continue, in one line. The tracebacks have the form of Ray 2.60's."""

from cluster.batch.ray_job import cause

NOT_LOADED = """The actor died because of an error raised in its creation task, ray::MapWorker.__init__() (pid=1)
           ^^^^^^^^^^^^^^^^^^^^^^^^^
  File "a.py", line 3, in load
    raise CheckpointError("x")
llava_core.errors.CheckpointError: /m/model.safetensors is missing; download it again.
"""
FAILED_CALL = """\x1b[36mray::MapWorker(MapBatches(Prepare)).submit()\x1b[39m (pid=1)
KeyError: 'inner'

The above exception was the direct cause of the following exception:

\x1b[36mray::MapWorker(MapBatches(Prepare)).submit()\x1b[39m (pid=1)
  File "a.py", line 11, in __call__
    raise TypeError("a text must be str") from error
TypeError: a text must be str

The above exception was the direct cause of the following exception:

\x1b[36mray::MapWorker(MapBatches(Prepare)).submit()\x1b[39m (pid=1)
ray.exceptions.UserCodeException: UDF failed to process a data block.
Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
"""


def test_the_cause_is_the_last_error_that_is_not_rays() -> None:
    assert cause(NOT_LOADED) == "CheckpointError: /m/model.safetensors is missing; download it again"
    assert cause(FAILED_CALL) == "TypeError: a text must be str"


def test_an_error_of_rays_own_is_the_cause_where_there_is_no_other() -> None:
    assert cause("ray.exceptions.ObjectLostError: the object is gone.\n") == "ObjectLostError: the object is gone"


def test_a_text_without_a_named_error_is_returned_as_it_is() -> None:
    assert cause(" the node is gone \n") == "the node is gone"
