"""Where the pictures and captions of a training come from, and how they become batches."""
