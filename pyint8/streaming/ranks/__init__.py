"""Loads that the ranks of a torch.distributed process group do together: each reads its part, all get everything.

Bytes are gathered below the quantizer, so what is made of them, and what is said of them, is what one process has.
"""
