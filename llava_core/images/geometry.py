"""How many tokens a picture becomes. The one place that knows: prompts, scheduling and splicing all ask here.

Integers only; imports neither torch nor Pillow.
"""

from llava_core.config import VisionConfig


def num_image_tokens(vision: VisionConfig) -> int:
    """Placeholders of one picture: a row of features per patch, plus one where the class feature is kept."""
    return vision.patches_per_side**2 + (1 if vision.select_feature == "cls_patch" else 0)
