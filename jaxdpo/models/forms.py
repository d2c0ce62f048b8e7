"""The forms of attention by name."""

from jaxdpo.models.attention import AttentionForm, attention, tree_mask
from jaxdpo.models.blockwise import blockwise_attention, find_blocks
from jaxdpo.models.splash import splash_attention, splash_mask

ATTENTION: dict[str, AttentionForm] = {
    "dense": AttentionForm(tree_mask, attention),
    "blockwise": AttentionForm(find_blocks, blockwise_attention),
    "splash": AttentionForm(splash_mask, splash_attention),
}
"""Name -> form; which one a platform gets by default stands in `train.prepare`."""
