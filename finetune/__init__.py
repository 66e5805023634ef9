"""A parameter-efficient fine-tuning toolkit for the LLaMA family."""
