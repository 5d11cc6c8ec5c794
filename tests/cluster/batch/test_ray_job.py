"""Ray's message when it cannot continue, in one line."""

from cluster.batch.ray_job import cause

TRACEBACK = """The actor died because of an error raised in its creation task, ray::MapWorker.__init__() (pid=1)
  File "a.py", line 3, in load
    raise CheckpointError("x")
llava_core.errors.CheckpointError: /m/model.safetensors is missing; download it again

The above exception was the direct cause of the following exception:

ray.exceptions.ActorDiedError: the actor died.
"""


def test_the_cause_is_the_last_named_error() -> None:
    assert cause(TRACEBACK.partition("\n\nThe above")[0]) == (
        "CheckpointError: /m/model.safetensors is missing; download it again"
    )


def test_a_text_without_a_named_error_is_returned_as_it_is() -> None:
    assert cause(" the node is gone \n") == "the node is gone"
