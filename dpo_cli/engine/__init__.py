"""Backward and step; the only room for DeepSpeed and torch.distributed."""
