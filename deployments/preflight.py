"""Is there anything to serve? Looked at before replicas start, in a second, without reading weights or importing torch.

Whatever this misses, such as a tensor of the wrong shape, the replica that loads it finds.
"""

from pathlib import Path

from deployments.settings import AppArgs


def check_checkpoint(args: AppArgs) -> Path:
    """The checkpoint's folder, fetched if it is a hub id. Raises CheckpointError naming file and fix."""
    # A second's worth of tokenizer library, not wanted for a --help.
    from llava_core.checkpoints.accounting import check_tensors
    from llava_core.checkpoints.describe import load_preparer
    from llava_core.checkpoints.layout import open_checkpoint

    checkpoint = open_checkpoint(args.checkpoint, args.base)
    load_preparer(checkpoint, template=args.template, limits=args.limits.request)
    check_tensors(checkpoint)
    return checkpoint.folder
