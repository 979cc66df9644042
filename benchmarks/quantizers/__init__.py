"""Our quantized forms beside those that gptqmodel and llm-compressor make when they are called by hand."""
