"""What a person sees: progress and tables on the terminal, Markdown, pictures.

Imports no other wing of the pipeline.
"""
