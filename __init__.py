"""LoRA Loom: train LoRA adapters on the loaded model, inside the graph, and apply them in the same run."""
