"""Fine-tune, merge, quantize and measure a language model: the same in a pod and on a workstation."""
