"""vtp_min: the training code of VTP, "Towards Scalable Pre-training of Visual Tokenizers for Generation"."""
from .model import SIZES, VTPConfig, VTPModel
