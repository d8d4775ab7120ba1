"""What is trained and what stays: the fine-tuning layer."""
