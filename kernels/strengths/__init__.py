"""How strong a LoRA acts, where and when: everything about it that is text, names and numbers.

* ``schedule``: weights over a run, and the clocks that tell how far a run has come
* ``blocks``, ``vectors``, ``presets``, ``components``: weights by layer and by part of the model
* ``tags``: ``<lora:name:…>`` in a prompt, in the dialects that people carry; ``lookup``: which file a name means
"""
