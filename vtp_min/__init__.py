"""vtp_min: a minimal implementation of VTP (Visual Tokenizer Pre-training).

Paper: Yao et al., "Towards Scalable Pre-training of Visual Tokenizers for Generation",
arXiv:2512.13687.
"""
from .model import SIZES, VTPConfig, VTPModel

__all__ = ["SIZES", "VTPConfig", "VTPModel"]
