"""The fast path: loss and gradients of LoRA on a frozen base, computed by hand, a layer at a time."""
