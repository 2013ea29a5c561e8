"""The page: the only room that knows Gradio. It reads rows and files; it imports no torch."""
