"""Room for the trainer: QLoRA straight on a mounted path, as a plugin on obsfs's public face. Nothing is here yet."""
