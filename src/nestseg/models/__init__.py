"""Networks: ResNeSt backbones, decode heads, and the segmenter that joins them."""
