"""``rc-topk calibrate``: learns the feature maps of ``completion=features`` from text that the user supplies."""
