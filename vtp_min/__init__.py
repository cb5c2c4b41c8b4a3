"""vtp_min: the training code of VTP.

VTP is "Towards Scalable Pre-training of Visual Tokenizers for Generation".
"""
from .model import SIZES, VTPConfig, VTPModel

__all__ = ["SIZES", "VTPConfig", "VTPModel"]
