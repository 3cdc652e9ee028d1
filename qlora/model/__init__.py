"""The model: loaded, quantized, cut into blocks, adapted, resident somewhere."""
