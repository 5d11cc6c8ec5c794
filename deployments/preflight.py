"""Is there anything to serve? Looked at before replicas start, in a second, without reading weights or importing torch.

Whatever this misses, such as a tensor of the wrong shape, the replica that loads it finds.
"""

from pathlib import Path

from deployments.settings import AppArgs
from llava_core.checkpoints.files import resolve_checkpoint


def check_checkpoint(args: AppArgs) -> Path:
    """The checkpoint's folder, fetched if it is a hub id. Raises CheckpointError naming file and fix."""
    # A second's worth of tokenizer library, not wanted for a --help.
    from llava_core.checkpoints.accounting import check_tensors
    from llava_core.checkpoints.describe import load_preparer

    folder = resolve_checkpoint(args.checkpoint)
    load_preparer(folder, template=args.template, limits=args.limits.request)
    check_tensors(folder)
    return folder
