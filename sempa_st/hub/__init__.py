"""Publish model folders on the Hugging Face Hub, and fetch them from it."""
