"""The five stages of the pipeline, one a file: each says what its strategies are and how they go together."""
