"""Features planted into a real residual stream: the ground truth that language models lack."""
