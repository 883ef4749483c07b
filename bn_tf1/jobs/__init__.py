"""What train.py and eval.py are made of: configuration, data, models and loops."""
