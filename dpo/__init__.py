"""Direct Preference Optimization in plain PyTorch. Start reading at loop.py, or at losses.py for the mathematics."""
