"""Multi-task fine-tuning of GPT-NeoX language models as a PyTorch Lightning application."""

__version__ = "0.1.0"
