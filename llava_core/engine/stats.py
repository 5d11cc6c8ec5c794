"""What the engine counts about itself, cheaply enough to do so always. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Totals since the start, and how things stand after the last step. Times in seconds."""

    num_blocks: int
    # Steps that ran anything.
    num_steps: int = 0
    step_seconds: float = 0.0
    # Tokens run through the model, tokens found in the cache instead (also by those set back), and tokens written.
    computed_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    # Of all steps, the requests in each: over num_steps, the mean batch size.
    scheduled_requests: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_running: int = 0
    num_waiting: int = 0
    # Tokens that are to be read, of prompts and of answers that were set back, before all of these can be written on.
    num_unread: int = 0
    # Requests in the last step that ran anything.
    batch_size: int = 0
    # Blocks that a request holds, and those that are kept for their content.
    used_blocks: int = 0
    idle_blocks: int = 0
