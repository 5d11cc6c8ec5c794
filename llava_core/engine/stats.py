"""The engine's counters, cheap enough to be always on. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Totals since the start, and the state after the last step. Times in seconds."""

    num_blocks: int
    # Steps that ran anything.
    num_steps: int = 0
    step_seconds: float = 0.0
    # Tokens run through the model, tokens found in the cache instead (also after preemption), and tokens generated.
    computed_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    # Requests in each step, summed over all steps: divided by num_steps, the mean batch size.
    scheduled_requests: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_running: int = 0
    num_waiting: int = 0
    # Tokens of prompts and of preempted answers still to be prefilled before all answers can be decoded.
    num_unread: int = 0
    # Requests in the last step that ran anything.
    batch_size: int = 0
    # Blocks held by requests, and idle blocks kept for their content.
    used_blocks: int = 0
    idle_blocks: int = 0
