"""Teach the host to recognise the demo base, so that its stock checkpoint loader opens the file.

A host extension (a folder in ``custom_nodes``) for the demo and the tests only. It adds no node: it puts one model
configuration at the head of the host's list. The model is the host's own UNet working straight on pixels
(rectified flow), the host's own CLIP text encoder with a narrow width, and the host's pixel-space VAE.
"""

import comfy.latent_formats
import comfy.model_base
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base

TEXT_WIDTH = 32
CLIP_CONFIG = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "projection_dim": TEXT_WIDTH,
}


class DemoClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None, **rest):
        options = {**(model_options or {}), "clip_l_model_config": CLIP_CONFIG}
        super().__init__(device=device, dtype=dtype, model_options=options, **rest)


class DemoBase(comfy.supported_models.SD15):
    """1.0 M to 3 M parameters, 32 × 32 pixels, text context of width 32."""

    unet_config = {"context_dim": TEXT_WIDTH, "in_channels": 3, "use_temporal_attention": False}
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}
    latent_format = comfy.latent_formats.ChromaRadiance  # three channels, pixels in [-1, 1]
    sampling_settings = {"shift": 1.0}
    memory_usage_factor = 0.1

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.FLOW

    def inpaint_model(self):
        return False

    def clip_target(self, state_dict={}):  # noqa: B006 - the host's signature
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, DemoClip)


comfy.supported_models.models.insert(0, DemoBase)

NODE_CLASS_MAPPINGS: dict = {}
