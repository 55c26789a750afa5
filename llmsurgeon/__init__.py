"""Surgery on pretrained Hugging Face checkpoints: measure, cut, heal, prove, ship."""

__version__ = "0.1.0"
