"""The loop of cuts, and masked fine-tuning."""
