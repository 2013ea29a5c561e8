"""What a creator owns: clips, subjects, models and their downloads. Knows nothing of Gradio; imports no torch."""
