"""What is done to LoRA files as a whole: merge, extract, resize, convert, inspect. No ComfyUI, no widgets.

Every tool returns an ``Outcome``: the file, what happened to each layer, what else there is to say.
"""
