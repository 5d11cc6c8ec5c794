"""What a served model computes: its engine, with every preparation for inference."""

import pytest
from torch import Tensor

from llava_core.engine.scheduler import Chunk
from llava_core.inference import LocalModel
from llava_core.types import PreparedRequest


def first_logits(model: LocalModel, prepared: PreparedRequest) -> Tensor:
    """Return the logits (vocab,) from which the first token of the answer is chosen."""
    rows: list[Tensor] = []
    runner = model.engine._runner
    run = runner.run

    def recorded(chunks: list[Chunk]) -> Tensor:
        logits = run(chunks)
        rows.extend(logits)
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run", recorded)
        for _ in model.stream(prepared):
            pass
    return rows[0]
