"""The names of blocks on the host's full-size models: the vectors that people know, block by block."""

import pytest

from full_size import full_size
from lora_loom.kernels.block_names import resolve
from lora_loom.kernels.blocks import block_map
from lora_loom.kernels.layers import attention_blocks

# the names that sd-webui-lora-block-weight lists for its vectors
SD15 = "BASE " + " ".join(f"IN{n:02}" for n in range(12)) + " M00 " + " ".join(f"OUT{n:02}" for n in range(12))
SD15_SHORT = "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
SDXL = "BASE " + " ".join(f"IN{n:02}" for n in range(9)) + " M00 " + " ".join(f"OUT{n:02}" for n in range(9))
SDXL_SHORT = "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
FLUX = "base " + " ".join([f"double.{n}" for n in range(19)] + [f"single.{n}" for n in range(38)])


@pytest.mark.parametrize(
    "model, vector, attention",
    [("sd15", SD15, False), ("sd15", SD15_SHORT, True), ("sdxl", SDXL, False), ("sdxl", SDXL_SHORT, True),
     ("flux", FLUX, False)],
)
def test_vectors(model, vector, attention):
    blocks = block_map(full_size(model))
    meant = [resolve(name, blocks) for name in vector.split()]
    counted = attention_blocks(blocks) if attention else blocks
    assert meant == [{"base"}, *({block.id} for block in counted)]


@pytest.mark.parametrize("model", ["sd35_medium", "wan_14b", "qwen_image", "chroma", "z_image", "aura", "ltxv"])
def test_every_id_and_group_is_a_name(model):
    blocks = block_map(full_size(model))
    for block in blocks:
        assert resolve(block.id, blocks) == {block.id}
        assert resolve(block.group, blocks) == {other.id for other in blocks if other.group == block.group}
    assert resolve("all", blocks) == {"base", *(block.id for block in blocks)}
