"""One literal per model family; the file is named after the `model_type` of its config."""
