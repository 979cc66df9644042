"""The speed and memory of our training on a GPU beside those of TRL and PEFT, and of Unsloth where it is installed."""
