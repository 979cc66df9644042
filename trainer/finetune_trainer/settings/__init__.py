"""Every setting that was left open, fixed once by prepare. Pure."""
